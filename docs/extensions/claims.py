"""What the cards in papers/ claim and found, read from their README.md: the verdict, and the table of claims."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["OUTCOMES", "Claim", "claim_table", "read_claims", "read_verdict"]

HEADER = "| claim | paper | here | outcome |"
OUTCOMES = ("holds", "does not hold", "cannot be told", "open")


class Claim(NamedTuple):
    """A line of a card's table: what is claimed, the paper's number, ours, and one of ``OUTCOMES``."""

    claim: str
    paper: str
    here: str
    outcome: str


def read_verdict(text: str) -> str | None:
    """The verdict of a card, without its full stop; None where there is none.

    >>> read_verdict("**Verdict: no, and the mask costs.** Three seeds.")
    'no, and the mask costs'
    """
    found = re.search(r"\*\*Verdict: (.*?)\.\*\*", " ".join(text.split()))
    return found[1] if found else None


def read_claims(text: str) -> list[Claim]:
    """The lines of a card's table of claims, none where it has no such table."""
    lines = text.splitlines()
    if HEADER not in lines:
        return []
    claims = []
    for line in lines[lines.index(HEADER) + 2 :]:
        if not line.startswith("|"):
            break
        claims.append(Claim(*(cell.strip() for cell in line.strip("|").split("|"))))
    return claims


def claim_table(papers: Path, order: list[str], link: str) -> list[str]:
    """The claims of all cards as one table of Markdown: those of ``order`` first; ``link`` leads to ``papers``."""
    found = sorted(path.parent.name for path in papers.glob("*/README.md"))
    lines = ["| card | claim | paper | here | outcome |", "| --- | --- | --- | --- | --- |"]
    for name in [*order, *(name for name in found if name not in order)]:
        claims = read_claims((papers / name / "README.md").read_text(encoding="utf-8"))
        lines += [f"| [{name}]({link}/{name}/README.md) | {' | '.join(claim)} |" for claim in claims]
    return lines

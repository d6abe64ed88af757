"""What README and docs show: their blocks of code, and their commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
CARDS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "papers").glob("*/README.md"))

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_INDENTED = re.compile(r"(?:^    .*\n)+", re.M)


class Block(NamedTuple):
    """A block of code: its language, "" where none is named, and its text."""

    kind: str
    text: str


def blocks(page: str) -> list[Block]:
    """The blocks of a page, in order; indented ones count as shell where they start with a command."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [(match.start(), Block(match[1], match[2])) for match in _FENCED.finditer(text)]
    rest = _FENCED.sub(lambda match: "\n" * len(match[0]), text)  # the others keep their places
    for match in _INDENTED.finditer(rest):
        lines = re.sub(r"^    ", "", match[0], flags=re.M)
        if lines.startswith("spectralmoe "):
            found.append((match.start(), Block("sh", lines)))
    return [block for _, block in sorted(found, key=lambda item: item[0])]


def commands(page: str) -> list[list[str]]:
    """The words behind ``spectralmoe`` of every command of a page, without comments."""
    lines = [
        line for block in blocks(page) if block.kind == "sh" for line in block.text.replace("\\\n", " ").split("\n")
    ]
    words = [shlex.split(line.removeprefix(".venv/bin/"), comments=True) for line in lines]
    return [line[1:] for line in words if line[:1] == ["spectralmoe"]]


def anchors(path: Path) -> set[str]:
    """What a link may name behind # in a page: its headings, as they are written in addresses.

    >>> "two-commands" in anchors(ROOT / "README.md")
    True
    """
    headings = re.findall(r"^#+ (.*)$", _FENCED.sub("", path.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}

"""What the package asks for, why, and what it is tested with: pyproject.toml, constraints-min.txt, constraints.txt."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

__all__ = ["version_table"]

READERS = ("bench", "dev", "docs", "megatron", "notebooks")
"""Extras that are not for users."""


def version_table(root: Path) -> list[str]:
    """A table of Markdown: each package, its oldest version and why, the version of ``make test``, the extras with it.

    A reason is what stands behind the version in constraints-min.txt; where there is none, no older one was tried.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tested = dict(re.findall(r"^([\w.-]+)==(\S+)", (root / "constraints.txt").read_text(encoding="utf-8"), re.M))
    least = root / "constraints-min.txt"
    reasons = dict(
        re.findall(r"^([\w.-]+)===?[^\s=]+ +# (.*)$", least.read_text(encoding="utf-8"), re.M) if least.exists() else ()
    )
    extras: dict[str, list[str]] = {line: [] for line in project["dependencies"]}
    for extra, lines in project["optional-dependencies"].items():
        for line in lines if extra not in READERS else ():
            extras.setdefault(line, []).append(extra)
    table = ["| package | oldest | tested with | for | why no older one |", "| --- | --- | --- | --- | --- |"]
    oldest, python = project["requires-python"].removeprefix(">="), project["classifiers"]
    known = " ".join(word for word in re.findall(r"Python :: (3\.\d+)", "\n".join(python)))
    table.append(f"| Python | {oldest} | {known} | everything | settings are read by tomllib, which 3.10 lacks |")
    for line, names in extras.items():
        package, _, version = line.partition(">=")
        why = reasons.get(package, "no older one was tried")
        cells = package, version, tested.get(package, ""), ", ".join(names) or "everything", why
        table.append(f"| {' | '.join(cells)} |")
    return table

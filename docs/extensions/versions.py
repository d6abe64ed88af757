"""What the package asks for, and what it is tested with, read from pyproject.toml and constraints.txt."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

__all__ = ["version_table"]

READERS = ("bench", "dev", "docs", "megatron", "notebooks")
"""Extras that are not for users."""


def version_table(root: Path) -> list[str]:
    """A table of Markdown: each package, its oldest version, the version of ``make test``, and the extras with it."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tested = dict(re.findall(r"^([\w.-]+)==(\S+)", (root / "constraints.txt").read_text(encoding="utf-8"), re.M))
    extras: dict[str, list[str]] = {line: [] for line in project["dependencies"]}
    for extra, lines in project["optional-dependencies"].items():
        for line in lines if extra not in READERS else ():
            extras.setdefault(line, []).append(extra)
    table = ["| package | oldest | tested with | for |", "| --- | --- | --- | --- |"]
    oldest, python = project["requires-python"].removeprefix(">="), project["classifiers"]
    known = " ".join(word for word in re.findall(r"Python :: (3\.\d+)", "\n".join(python)))
    table.append(f"| Python | {oldest} | {known} | everything |")
    for line, names in extras.items():
        package, _, version = line.partition(">=")
        table.append(f"| {package} | {version} | {tested.get(package, '')} | {', '.join(names) or 'everything'} |")
    return table

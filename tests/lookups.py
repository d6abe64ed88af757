"""Single values of the repository's JSON files, for the numbers that sentences derive from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

Place = str | Sequence[float]
"""Where a number stands: a file, narrowed by what its lines or entries hold ("FILE > text > text"); numbers worked out
from such files; or what the passage itself cites ("cites: text")."""
Sentences = list[tuple[str, Place]]
"""Sentences with ``#`` for each number, and the place where they stand."""


def at(name: str, *keys: str | int) -> Any:
    """What a JSON file holds under keys; in a list, a text is the first entry that has it in one of its texts."""
    node = json.loads((ROOT / name).read_text(encoding="utf-8"))
    for key in keys:
        if isinstance(node, list) and isinstance(key, str):
            entries = [(one, [text for text in one.values() if isinstance(text, str)]) for one in node]
            exact = [one for one, texts in entries if key in texts]
            node = (exact or [one for one, texts in entries if any(key in text for text in texts)])[0]
        else:
            node = node[key]
    return node


def of_row(card: str, row: str, key: str) -> float:
    """A value of the first stored cell of a card's row.

    >>> of_row("mofme", "networks, 4", "numbers")
    32.896
    """
    return float(at(f"papers/{card}/results.json", row, key))


def in_results(card: str, *lines: tuple[str, str]) -> Sentences:
    """Sentences of a card, and what the lines of its RESULTS.md hold."""
    return [(text, f"papers/{card}/RESULTS.md > {line}") for text, line in lines]

"""Cells that a card has stored: chosen, compared by seed, shown, and compared with a rerun.

A cell is a mapping with a "seed", the "cpu" that it ran on, and measured values. A single cell is not stable: rounding
differs between processors, training makes the difference grow, and other samples are wrong in the end. Means over seeds
are.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from spectralmoe.experiments.statistics import Estimate, estimate, paired

__all__ = [
    "UNKNOWN_CPU",
    "Cells",
    "by_seed",
    "check_lines",
    "difference",
    "machines",
    "select",
    "show",
    "show_difference",
    "verdict",
]

Cells = Sequence[Mapping[str, Any]]

UNKNOWN_CPU = "not recorded"


def select(cells: Cells, **wanted: object) -> list[Mapping[str, Any]]:
    """The cells with all of these values.

    >>> select([{"row": "a", "seed": 0}, {"row": "b", "seed": 0}], row="b")
    [{'row': 'b', 'seed': 0}]
    """
    return [cell for cell in cells if all(cell.get(key) == value for key, value in wanted.items())]


def by_seed(cells: Cells, key: str) -> dict[Hashable, float | None]:
    """(seed, cpu) -> value, so that only cells of one seed and one processor make a pair."""
    return {(cell["seed"], cell.get("cpu", UNKNOWN_CPU)): cell.get(key) for cell in cells}


def difference(cells: Cells, key: str, row: str, baseline: str) -> Estimate | None:
    """The paired difference of ``key`` between two rows (``row`` minus ``baseline``)."""
    return paired(by_seed(select(cells, row=row), key), by_seed(select(cells, row=baseline), key))


def machines(cells: Cells) -> list[str]:
    """The processors of the cells, in order of first appearance."""
    return list(dict.fromkeys(cell.get("cpu", UNKNOWN_CPU) for cell in cells))


def show(value: Estimate | None, digits: int, scale: float = 1.0, *, sign: bool = False) -> str:
    """``mean ±half``, or a dash where nothing was measured.

    >>> show(estimate([0.25, 0.75]), 0, 100)
    '50 ±318'
    """
    if value is None or not math.isfinite(value.mean):
        return "-"
    half = f" ±{value.half * scale:.{digits}f}" if value.half else ""
    return f"{value.mean * scale:{'+' if sign else ''}.{digits}f}{half}"


def show_difference(value: Estimate | None, digits: int, scale: float = 1.0) -> str:
    """A paired difference with its sign, its interval, and whether the seeds tell the two rows apart.

    >>> show_difference(estimate([1.0, 1.1, 0.9]), 1), show_difference(estimate([1.0, -1.1, 0.0]), 1)
    ('+1.0 ±0.2 separated', '-0.0 ±2.6 not')
    >>> show_difference(estimate([1.0]), 1), show_difference(estimate([0.0, 0.0]), 1)
    ('+1.0 one seed', 'same')
    """
    if value is None:
        return "-"
    word = verdict(value)
    return word if word == "same" else f"{show(value, digits, scale, sign=True)} {word}"


def verdict(value: Estimate) -> str:
    """The verdict on a paired difference: "separated" or "not"; "one seed" or "two seeds" if these are too few.

    >>> verdict(estimate([1.0, 1.1])), verdict(estimate([1.0, 1.1, 0.9]))
    ('two seeds', 'separated')
    """
    if not any(value.values):
        return "same"
    few = {1: "one seed", 2: "two seeds"}.get(value.n)
    return few or ("separated" if value.separated else "not")


def check_lines(stored: Cells, again: Cells, groups: Sequence[str], keys: Sequence[str]) -> list[str]:
    """For every group and key one line: the mean of a rerun, and whether the interval of the stored cells holds it.

    Args:
        again: the cells of the rerun.
        groups: the keys that tell groups apart.  keys: what is compared.
    """
    lines = []
    for name in dict.fromkeys(tuple(cell[group] for group in groups) for cell in again):
        about = dict(zip(groups, name, strict=True))
        old, new = select(stored, **about), select(again, **about)
        for key in keys:
            was, now = estimate([cell.get(key) for cell in old]), estimate([cell.get(key) for cell in new])
            if now is None or was is None:
                continue
            word = "within" if was.holds(now.mean) else "OUTSIDE" if was.half is not None else "no interval"
            title = ", ".join(str(part) for part in name)
            lines.append(f"{title}: {key} {now.mean:.4f} ({now.n}), stored {show(was, 4)} ({was.n}): {word}")
    return lines

"""Which configurations of a grid are run: a cover of all pairs by default, the product, or a part of it, on demand."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

__all__ = ["crosses", "first_of", "one_of_each", "pairwise", "part_of"]


def pairwise(*factors: Iterable[Any], seed: int = 0) -> list[tuple[Any, ...]]:
    """Rows of the product that hold every value of each factor beside every value of each other factor.

    Greedy: those that add most pairs come first. ``seed`` chooses among equals.
    """
    tables = [list(factor) for factor in factors]
    rows = list(itertools.product(*(range(len(table)) for table in tables)))
    random.Random(seed).shuffle(rows)
    pairs = {row: set(itertools.combinations(enumerate(row), min(2, len(tables)))) for row in rows}
    missing, cover = set().union(*pairs.values()), []
    for gain in range(math.comb(len(tables), 2) or 1, 0, -1):
        for row in rows:
            if len(pairs[row] & missing) >= gain:
                cover.append(row)
                missing -= pairs[row]
    return [tuple(table[i] for table, i in zip(tables, row, strict=True)) for row in sorted(cover)]


def crosses(
    first: Iterable[Any], second: Iterable[Any], centres: tuple[Any, Sequence[Any]], seed: int = 0
) -> list[tuple[Any, Any]]:
    """Pairs in the shape of a cross: one value with every one of ``second``, some of ``second`` with every one of
    ``first``, and each value of either with a partner that ``seed`` chooses."""
    first, second = list(first), list(second)
    centre, others = centres
    cross = [*((centre, b) for b in second), *((a, b) for a in first for b in others)]
    draw = random.Random(seed)
    cross += [(a, draw.choice(second)) for a in first] + [(draw.choice(first), b) for b in second]
    return list(dict.fromkeys(cross))


def first_of(count: int, values: Iterable[Any]) -> list[Any]:
    """Values of one parameter: the first ``count`` of them, and the others marked ``full``."""
    return [pytest.param(v, marks=[] if i < count else pytest.mark.full) for i, v in enumerate(values)]


def one_of_each(**factors: Iterable[Any]) -> pytest.MarkDecorator:
    """A mark: as few rows of the product as hold every value of each factor; the others are marked ``full``."""
    tables = [list(factor) for factor in factors.values()]
    cover = {tuple(i % len(table) for table in tables) for i in range(max(map(len, tables)))}
    rows = [
        pytest.param(*(t[i] for t, i in zip(tables, row, strict=True)), marks=[] if row in cover else pytest.mark.full)
        for row in itertools.product(*(range(len(table)) for table in tables))
    ]
    return pytest.mark.parametrize(list(factors), rows)


def part_of(rows: Sequence[Any], part: str) -> list[Any]:
    """``part_of(rows, "2/3")``: the second of three parts, every third row."""
    number, parts = map(int, part.split("/"))
    return list(rows[number - 1 :: parts])

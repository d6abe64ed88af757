"""What the grids of the default run cover."""

from __future__ import annotations

import itertools

import pytest
from grids import pairings, pairwise, part_of
from seeds import shifted


@pytest.mark.parametrize("sizes", [(3,), (4, 5), (9, 10, 3, 2), (2, 2, 2, 2, 2), (3, 0)], ids=str)
def test_a_cover_holds_every_pair_once_at_least(sizes):
    factors = [[f"{name}{i}" for i in range(size)] for name, size in zip("abcde", sizes, strict=False)]
    rows = pairwise(*factors, seed=shifted(1))
    wanted = {pair for one, two in itertools.combinations(factors, 2) for pair in itertools.product(one, two)}
    assert {pair for row in rows for pair in itertools.combinations(row, 2)} == (wanted if all(sizes) else set())
    assert len(rows) <= 2 * max([a * b for a, b in itertools.combinations(sizes, 2)], default=sizes[0])
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize(("rows", "columns"), [*itertools.product([1, 2, 4, 5, 8], repeat=2)])
def test_pairings_give_each_row_two_columns_and_leave_no_column_out(rows, columns):
    pairs = pairings(range(rows), range(columns), seed=shifted(1))
    assert len(set(pairs)) == len(pairs) == max(min(2, columns) * rows, columns)
    assert all(len({b for a, b in pairs if a == row}) >= min(2, columns) for row in range(rows))
    assert {b for _, b in pairs} == set(range(columns))


def test_another_seed_pairs_otherwise():
    assert len({tuple(pairings(range(5), range(8), seed=shifted(seed))) for seed in range(5)}) > 1


def test_parts_make_up_the_whole():
    parts = [part_of(range(10), f"{i}/3") for i in (1, 2, 3)]
    assert sorted(itertools.chain(*parts)) == list(range(10))

"""What the grids of the default run cover."""

from __future__ import annotations

import itertools

import pytest
from grids import crosses, one_of_each, pairwise, part_of
from seeds import shifted


@pytest.mark.parametrize("sizes", [(3,), (4, 5), (9, 10, 3, 2), (2, 2, 2, 2, 2), (3, 0)], ids=str)
def test_a_cover_holds_every_pair_once_at_least(sizes):
    factors = [[f"{name}{i}" for i in range(size)] for name, size in zip("abcde", sizes, strict=False)]
    rows = pairwise(*factors, seed=shifted(1))
    wanted = {pair for one, two in itertools.combinations(factors, 2) for pair in itertools.product(one, two)}
    assert {pair for row in rows for pair in itertools.combinations(row, 2)} == (wanted if all(sizes) else set())
    assert len(rows) <= 2 * max([a * b for a, b in itertools.combinations(sizes, 2)], default=sizes[0])
    assert len(set(rows)) == len(rows)


def test_a_cross_holds_its_two_lines_and_a_partner_for_each_value():
    first, second = "abcde", range(9)
    for seed in range(5):
        pairs = crosses(first, second, ("a", (0, 4)), seed=shifted(seed))
        assert len(set(pairs)) == len(pairs) <= 9 + 2 * 5 + 5 + 9
        assert {("a", b) for b in second} | {(a, b) for a in first for b in (0, 4)} <= set(pairs)


def test_another_seed_pairs_otherwise():
    assert len({tuple(crosses("abcde", range(8), ("a", (0,)), seed=shifted(seed))) for seed in range(5)}) > 1


def test_one_of_each_leaves_the_others_to_the_full_run():
    names, rows = one_of_each(a="xyz", b="uv").args
    assert names == ["a", "b"]
    assert [row.values for row in rows] == list(itertools.product("xyz", "uv"))
    assert [row.values for row in rows if not row.marks] == [("x", "u"), ("y", "v"), ("z", "u")]
    assert {mark.name for row in rows for mark in row.marks} == {"full"}


def test_parts_make_up_the_whole():
    parts = [part_of(range(10), f"{i}/3") for i in (1, 2, 3)]
    assert sorted(itertools.chain(*parts)) == list(range(10))

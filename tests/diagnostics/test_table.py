"""One table of values: what is measured from what is at hand, and the pages that are made from it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from spectralmoe.diagnostics import VALUES, Evidence, LayerStatistics, centred_cosines, cosine_matrix, measured
from spectralmoe.diagnostics.table import GROUPS, NEEDS

ROOT = Path(__file__).parent.parent.parent


def empty(**known):
    return Evidence(LayerStatistics(3, 2), LayerStatistics(3, 2), **known)


def test_the_table_of_the_docs_is_this_one():
    written = [line for line in (ROOT / "docs" / "inspect.md").read_text().splitlines() if line.startswith("| `")]
    rows = [f"| `{value.name}` | {value.meaning} | {value.needs} | {value.better} |" for value in VALUES.values()]
    assert [line for line in written if line in rows] == rows
    assert len([line for line in written if line.split("`")[1].partition(".")[0] in GROUPS]) == len(rows)


def test_every_line_says_what_it_is_and_stands_once():
    names = [value.name for value in VALUES.values()]
    assert list(VALUES) == names
    assert len(set(names)) == len(names)
    assert all(value.title and value.meaning and value.needs in NEEDS for value in VALUES.values())
    assert names == sorted(names, key=lambda name: GROUPS.index(name.partition(".")[0]))


@pytest.mark.parametrize("need", NEEDS)
def test_what_was_not_looked_at_has_no_data_and_a_group_without_any_is_null(need):
    evidence = empty(matrix=torch.eye(3), outputs=torch.randn(3, 20, 5), labels=torch.full((2, 3), 40))
    if need in ("tokens", "gradients"):
        return  # these run a layer
    blocks = measured(evidence, {need})
    assert list(blocks) == list(GROUPS)
    for group, block in blocks.items():
        lines = [value for value in VALUES.values() if value.group == group]
        assert (block is None) == (need not in {value.needs for value in lines})
        for value in lines:
            if block is not None and value.needs != need:
                assert block[value.key] == {"value": None, "data": 0, "unit": "tokens", "needs": 1}


def by_hand(outputs):
    """Mean over tokens of the squared cosine of two experts' outputs less their means, pair by pair."""
    e, n, _ = outputs.shape
    means = [sum(outputs[i, t] for t in range(n)) / n for i in range(e)]
    table = torch.zeros(e, e, dtype=torch.float64)
    for i in range(e):
        for j in range(e):
            for t in range(n):
                a, b = outputs[i, t] - means[i], outputs[j, t] - means[j]
                table[i, j] += (a @ b) ** 2 / (a @ a) / (b @ b) / n
    return table


def test_centred_likeness_is_the_loop_over_pairs_and_tokens(close):
    outputs = torch.randn(3, 12, 5, dtype=torch.float64) + 2
    close(centred_cosines(outputs), by_hand(outputs))
    close(centred_cosines(outputs.float()), by_hand(outputs), torch.float32)


def test_what_an_expert_adds_to_every_token_does_not_make_it_alike(close):
    outputs = torch.randn(2, 40, 6, dtype=torch.float64)
    moved = outputs + 1e3 * torch.ones(6, dtype=torch.float64)
    close(centred_cosines(moved), centred_cosines(outputs), torch.float32)
    assert cosine_matrix(moved)[0, 1] > 0.99
    assert centred_cosines(moved)[0, 1] < 0.5


def test_an_expert_that_answers_always_the_same_is_like_no_other():
    outputs = torch.stack([torch.randn(20, 4), torch.randn(4).expand(20, 4)])
    assert centred_cosines(outputs)[0, 1] == 0
    assert centred_cosines(outputs)[1, 1] == 0
    assert math.isnan(centred_cosines(torch.empty(2, 0, 4))[0, 1])


def test_it_is_measured_with_the_other_likenesses():
    outputs = torch.randn(3, 30, 5)
    block = measured(empty(outputs=outputs), {"outputs"})["similarity"]
    pairs = by_hand(outputs.double())[torch.triu_indices(3, 3, 1).unbind()]
    assert block["output_centred"]["value"] == pytest.approx(float(pairs.mean()), rel=1e-5)
    assert block["output_centred"]["data"] == 30
    assert measured(empty(outputs=outputs[:, :7]), {"outputs"})["similarity"]["output_centred"]["value"] is None

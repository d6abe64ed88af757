"""The card of knowledge attribution: what its rows choose, and a tiny run with every row and field."""

import json
from pathlib import Path

import pytest
import torch
from seeds import shifted

from spectralmoe.experiments.cards import run_card

CARD = Path(__file__).parents[2] / "papers" / "attribution"


@pytest.fixture
def seen(card):
    """Six facts in two layers of eight experts, two a fact."""
    from facts import EXPERTS, Seen

    weight = torch.rand(6, 2, EXPERTS)
    weight = weight.masked_fill(weight < weight.topk(2).values[..., 1:], 0)
    return Seen(("0", "1"), torch.randn(weight.shape).masked_fill(weight == 0, 0), weight)


def test_one_expert_of_the_used_by_each_measure(card, seen):
    from facts import one_of_the_used, same_choice

    draw = torch.Generator().manual_seed(shifted(1))
    chosen = {row: one_of_the_used(row, seen, draw) for row in card.FACT_ROWS if row != "whole"}
    for experts in chosen.values():
        assert seen.used.gather(2, experts[..., None]).all()
    best = seen.gain.masked_fill(~seen.used, -torch.inf).amax(-1)
    assert torch.equal(seen.gain.gather(2, chosen["attributed"][..., None])[..., 0], best)
    assert torch.equal(chosen["largest weight"], seen.weight.argmax(-1))
    places = torch.cat([places for _, places in same_choice(chosen["random used"])])
    assert places.sort().values.tolist() == list(range(6))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_control_is_another_set_of_nearly_the_same_usage(card, seen, count):
    from facts import by_layer, most

    draw = torch.Generator().manual_seed(shifted(1))
    found = {row: most(row, count, seen, draw) for row in card.RELATION_ROWS}
    assert set(found["equal usage"][0]) != set(found["attributed"][0])
    assert all(len(set(experts)) == count for experts, _ in found.values())
    assert found["most used"][1] >= max(usage for _, usage in found.values()) - 1e-6
    assert abs(found["equal usage"][1] - found["attributed"][1]) <= 0.2
    assert by_layer([1, 9, 15], seen.layers) == {"0": [1], "1": [1, 7]}


@pytest.mark.full
def test_a_tiny_run_holds_every_row_and_field(card, tmp_path):
    sizes = card.Sizes(subjects=5, relations=2, objects=4, steps=3, batch=8, seeds=1)
    for ran in (True, False):  # a rerun does only what is missing
        count, notes = run_card(card.card(sizes), tmp_path, tmp_path / "work", 1, lambda *text: None)
        assert ((count > 0), notes) == (ran, [])
    stored = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("facts", "relations", "parts")}
    assert {cell["row"] for cell in stored["facts"]} == {*card.FACT_ROWS}
    assert {(cell["row"], cell["count"]) for cell in stored["relations"]} == {
        (row, count) for row in card.RELATION_ROWS for count in card.COUNTS
    }
    assert {cell["row"] for cell in stored["parts"]} == {*card.PART_ROWS}
    for name, columns in (
        ("facts", card.FACT_COLUMNS),
        ("relations", card.RELATION_COLUMNS),
        ("parts", card.PART_COLUMNS),
    ):
        assert all(cell.keys() >= {column.key for column in columns} for cell in stored[name])

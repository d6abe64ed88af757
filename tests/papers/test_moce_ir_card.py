"""The card of MoCE-IR: every row runs, costs are counted, and the control says them of other experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spectralmoe.data.degradations import KINDS
from spectralmoe.experiments.cards import Contest, run_card
from spectralmoe.presets import find_preset

CARD = Path(__file__).parents[2] / "papers" / "moce-ir"


@pytest.mark.full
def test_a_tiny_run_holds_every_row_and_field(card, tmp_path):
    pytest.importorskip("skimage")
    small = card.card(Contest(card.run_of(10, 1), card.ROWS, tries=1, more=card.measure), seeds=1)
    count, notes = run_card(small, tmp_path, tmp_path / "work", 1, lambda text, done, detail="": None)
    assert (count, notes) == (len(card.ROWS) * 2, [])
    cells = json.loads((tmp_path / "results.json").read_text())
    assert [cell["row"] for cell in cells] == list(card.ROWS)
    text = (tmp_path / "RESULTS.md").read_text()
    assert all(text.count(f"| {one} | {other} | 1 |") == 2 for one, other in card.PAIRS)
    assert all(cell.keys() >= {column.key for column in (*card.PSNR, card.TOLD, *card.COSTS)} for cell in cells)


def test_experts_cost_more_and_more_and_equal_ones_as_much_together(card):
    from rows import COSTS, EQUAL, EVEN, PERMUTED, UNEQUAL, costs_of

    def numbers(row):
        bank = find_preset(card.ROWS[row]).make_experts(4, 32, 64)
        return sum(parameter.numel() for parameter in bank.parameters())

    assert sorted(COSTS) == COSTS
    assert COSTS[-1] > 5 * COSTS[0]
    assert abs(numbers("equal") / numbers("unequal") - 1) < 0.05
    assert costs_of(EQUAL) == costs_of(EQUAL[:1]) * len(UNEQUAL)
    assert sorted(PERMUTED) == COSTS
    assert all(one != other for one, other in zip(PERMUTED, COSTS, strict=True))
    said = [find_preset(row).terms["complexity_balance"].fn.keywords["costs"] for row in list(card.ROWS.values())[1:]]
    assert said == [EVEN, EVEN, COSTS, PERMUTED, COSTS]


def test_costs_by_kind_by_hand(card):
    table = torch.zeros(len(KINDS), 2, dtype=torch.int64)
    table[0], table[1] = torch.tensor([3, 1]), torch.tensor([0, 4])
    from measure import costs_by_kind

    found = costs_by_kind(table, torch.tensor([1e6, 5e6], dtype=torch.float64))
    assert [found[f"cost_{kind}"] for kind in KINDS[:3]] == [2.0, 5.0, 0.0]
    assert found["cost"] == pytest.approx(7 / len(KINDS))

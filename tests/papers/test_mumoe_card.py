"""The card of multilinear experts: equal parameters, what its measures say of known experts, and a tiny run."""

import json
from pathlib import Path

import pytest
import torch

from spectralmoe.experiments.cards import run_card

CARD = Path(__file__).parents[2] / "papers" / "mumoe"


@pytest.mark.full
def test_a_tiny_run_holds_every_cell(card, tmp_path):
    sizes = card.Sizes(card.Budget(body_steps=2, steps=2), experts=(4, 64), train=60, measured=50, seeds=1)
    for ran in (True, False):  # a rerun does only what is missing
        count, notes = run_card(card.card(sizes), tmp_path, tmp_path / "work", 1, lambda *text: None)
        assert ((count > 0), notes) == (ran, [])
    cells = json.loads((tmp_path / "results.json").read_text())
    assert len(cells) == 4 * 2 + 1
    text = (tmp_path / "RESULTS.md").read_text()
    assert "entmax E=64, gates permuted" in text
    assert {cell["row"] for cell in cells} == set(card.ROWS)


def test_heads_have_as_many_parameters(card):
    for row in card.ROWS:
        for experts in (4, 16, 64, 256):
            size = sum(p.numel() for p in card.make_head(row, experts, card.Budget(), 10).parameters())
            assert abs(size - card.Budget().parameters) < 400, (row, experts)


def test_a_class_vector_is_what_the_expert_does_to_each_class(card, close):
    """Experts that say one class each, under gates that know it: no expert matters to a second class."""
    head = card.make_head("entmax", 3, card.Budget(width=3, parameters=200), 3)
    bank, x, labels = head.experts, torch.eye(3).repeat(2, 1), torch.arange(3).repeat(2)
    changes = card.class_changes(bank, x, x, labels, 3)
    for e in range(3):
        for c in range(3):
            row = x[c : c + 1]
            whole, without = bank.mix(row, row), bank.mix(row, row.index_fill(1, torch.tensor([e]), 0))
            close(changes[e, c], (whole.log_softmax(-1) - without.log_softmax(-1))[0, c])
    assert card.polysemanticity(changes) == pytest.approx(0.0, abs=1e-3)
    assert card.polysemanticity(torch.ones(4, 10)) == pytest.approx((2 - 2 / 10**0.5) ** 0.5)
    assert card.information(x, labels, 3) == pytest.approx(1.0)
    assert card.information(torch.ones(6, 3), labels, 3) == pytest.approx(0.0, abs=1e-9)

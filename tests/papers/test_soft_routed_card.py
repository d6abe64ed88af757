"""The card of soft-routed units: its arms move what they say, and a tiny run holds every cell."""

import json
from pathlib import Path

import pytest
import torch

from spectralmoe.experiments.cards import run_card
from spectralmoe.models import SoftRouted

CARD = Path(__file__).parents[2] / "papers" / "soft-routed"


@pytest.mark.full
def test_a_tiny_run_holds_every_cell(card, tmp_path):
    budget = card.Budget(batch=8, steps=3, tuned_steps=2, tested=20)
    count, notes = run_card(card.card(budget, (8, 16), 1), tmp_path, tmp_path / "work", 1, lambda *text: None)
    assert count > 0
    assert notes == []
    cells = json.loads((tmp_path / "results.json").read_text())
    assert len(cells) == 2 * len(card.ARMS)
    assert all(cell.keys() >= {column.key for column in card.COLUMNS} for cell in cells)


@pytest.mark.parametrize("arm", ["joint", "router frozen", "expert frozen"])
def test_an_arm_moves_its_directions_alone(card, arm):
    from dynamics import ARMS, learn

    student = SoftRouted(8, 3)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    learn(student, SoftRouted.teacher(8, 2), ARMS[arm], 0.1, 2, 16)
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"amplitudes", *ARMS[arm]}

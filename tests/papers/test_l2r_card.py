"""The card of L2R: every row runs, all start alike, and its own gates and measures are what they are said to be."""

import json
from pathlib import Path

import pytest
import torch

from spectralmoe import CosineScorer, SaturatedScorer
from spectralmoe.experiments.cards import Contest, run_card
from spectralmoe.presets import find_preset
from spectralmoe.training.settings.run import TrainSettings

CARD = Path(__file__).parents[2] / "papers" / "l2r"
RUN = TrainSettings(
    data="digits",
    depth=1,
    train_size=64,
    network={"width": 12, "num_experts": 4, "hidden": 4, "k": 1},
    optimization={"epochs": 1, "batch_size": 32},
)


@pytest.mark.full
def test_a_tiny_run_holds_every_row_and_field(card, tmp_path):
    small = card.card(Contest(RUN, card.ROWS, tries=1, more=card.look), seeds=1)
    for ran in (True, False):  # a rerun does only what is missing
        count, notes = run_card(small, tmp_path, tmp_path / "work", 1, lambda text, done, detail="": None)
        assert ((count > 0), notes) == (ran, [])
    cells = json.loads((tmp_path / "results.json").read_text())
    assert [cell["row"] for cell in cells] == list(card.ROWS)
    assert all(cell.keys() >= {column.key for column in card.COLUMNS} for cell in cells)
    assert all((cell["saturated"] is not None) == (cell["row"] in ("l2r", "l2r, 4 anchors")) for cell in cells)
    text = (tmp_path / "RESULTS.md").read_text()
    assert all(f"| {one} | {other} | 1 |" in text for one, other in card.PAIRS)


def test_rows_start_with_logits_of_like_size_and_gates_of_like_size(card):
    x = torch.randn(500, 64)
    for name, row in card.ROWS.items():
        scorer = find_preset(row).make_router(64, 16, k=1).scorer
        logits = scorer(x).detach()
        assert 0.6 < float((logits - logits.mean(1, keepdim=True)).std()) < 1.5, name
        numbers = sum(parameter.numel() for parameter in scorer.parameters())
        assert 1000 < numbers < (2100 if name == "l2r, 4 anchors" else 1300), name


def test_the_control_is_the_gate_with_a_constant_phi(card, close):
    from gates import ConstantScorer

    control, cosine = ConstantScorer(8, 4, rank=3, gain=2.0), CosineScorer(8, 4, proj_dim=3, temperature=0.5)
    saturated, x = SaturatedScorer(8, 4, rank=3, gain=2.0), torch.randn(50, 8)
    saturated.load_state_dict(control.state_dict())
    with torch.no_grad():
        cosine.keys.copy_(control.keys[:, 0])
        cosine.projection.copy_(control.projection)
    psi = 1 + (control.keys[:, 0].norm(dim=1) - 1) / 4
    close(control(x), cosine(x) * psi)
    phi = (x @ control.projection.T).norm(dim=1, keepdim=True).tanh()
    close(saturated(x), control(x) * phi)


def test_crowding_by_hand(card):
    pairs = torch.tensor([[[1.0, 0.0], [1.0, 0.1]], [[0.0, 2.0], [-3.0, 4.0]]])
    assert card.crowding(pairs) == pytest.approx(max(0.6, 0.1 / 1.01**0.5, abs(-3 + 0.4) / (5 * 1.01**0.5)))

"""The card of Guo's losses: every row runs, the noise floor is the baseline at a larger rate, measures by hand."""

import json
from pathlib import Path

import pytest
import torch

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
from spectralmoe.experiments.cards import Contest, run_card
from spectralmoe.presets import find_preset
from spectralmoe.training.settings.run import TrainSettings

CARD = Path(__file__).parents[2] / "papers" / "specialization"
RUN = TrainSettings(
    data="digits",
    depth=1,
    train_size=64,
    network={"width": 8, "num_experts": 4, "hidden": 4, "k": 2},
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
    assert set(json.loads((tmp_path / "tuning.json").read_text())) == set(card.TERMS)


def test_the_noise_floor_is_the_baseline_at_a_larger_rate(card, tmp_path, monkeypatch):
    from spectralmoe.experiments.cards.plan import Desk

    seen = []
    monkeypatch.setattr(card, "measure_cell", lambda cell, desk, progress, contest: seen.append((cell, desk)))
    desk = Desk(tmp_path, {"tuning": {"aux": {"setting": {"lr": 2.0, "strength": 3.0}}}})
    contest = Contest(RUN, card.ROWS)
    for row in ("aux", card.FLOOR):
        card.measure({"row": row, "seed": 0}, desk, print, contest=contest)
    (_, untouched), (cell, larger) = seen
    assert untouched is desk
    assert larger.tuned["tuning"][cell["row"]]["setting"] == {"lr": pytest.approx(2.2), "strength": 3.0}
    assert find_preset(card.ROWS[card.FLOOR]).terms == find_preset(card.ROWS["aux"]).terms


def test_measures_by_hand(card, close):
    """Two experts on two tokens: outputs (1, 0) and (0, 1), then (4, 0) and (3, 1); squared cosines 0 and 0.9."""
    layer = MoE(Router(LinearScorer(2, 2), TopK(2)), FeedForward(2, 2, 2, activation="relu"))
    layer.router.scorer.weight.data.zero_()
    for matrix, values in ((layer.experts.up, torch.eye(2).expand(2, 2, 2)),):
        matrix.data.copy_(values)
    layer.experts.down.data.copy_(torch.tensor([[[1.0, 4.0], [0, 0]], [[0, 3.0], [1.0, 1.0]]]))
    with record(layer, keep="output") as tape:
        layer(torch.eye(2))
    close(card.pair_cosine(tape[0]), 0.45)
    # (1, 0) is nearest to (0, 1) and back; (4, 0) and (3, 1) are nearest to each other: all of another expert
    close(card.foreign_neighbours(tape[0]), 1.0)

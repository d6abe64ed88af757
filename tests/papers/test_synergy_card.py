"""The card of the synergistic losses: every row runs, and the control is what it is said to be."""

import json
from pathlib import Path

import pytest
import torch

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
from spectralmoe.diagnostics.entropy import token_entropy
from spectralmoe.experiments.cards import Contest, run_card, small_text
from spectralmoe.presets import find_preset

CARD = Path(__file__).parents[2] / "papers" / "synergy"
RUN = small_text(16, width=16, num_experts=4, hidden=8)
RUN = RUN.model_copy(update={"text": RUN.text.model_copy(update={"length": 16, "measured": 4})})


@pytest.mark.full
def test_a_tiny_run_holds_every_row_and_field(card, tmp_path):
    small = card.card(Contest(RUN, card.ROWS, tries=1, more=card.look), seeds=1, weights=(0.01, 0.1))
    for ran in (True, False):  # a rerun does only what is missing
        count, notes = run_card(small, tmp_path, tmp_path / "work", 1, lambda text, done, detail="": None)
        assert ((count > 0), notes) == (ran, [])
    cells = json.loads((tmp_path / "results.json").read_text())
    assert [cell["row"] for cell in cells] == list(card.ROWS)
    assert all(cell.keys() >= {column.key for column in card.COLUMNS} for cell in cells)
    matched = json.loads((tmp_path / "matching.json").read_text())[card.MATCHED]
    assert 0.01 <= matched["weight"] <= 0.1
    assert [each["weight"] for each in matched["tries"]] == [0.01, 0.1]


def test_the_control_is_the_baseline_with_the_entropy_term_at_the_matched_weight(card, tmp_path, monkeypatch):
    from spectralmoe.experiments.cards.plan import Desk

    seen = []
    monkeypatch.setattr(card, "measure_cell", lambda cell, desk, progress, contest: seen.append((desk, contest)))
    setting = {"lr": 2.0, "strength": 3.0}
    desk = Desk(tmp_path, {"tuning": {}, "matching": {card.MATCHED: {"setting": setting, "weight": 0.25}}})
    card.measure({"row": card.MATCHED, "seed": 0}, desk, print, contest=Contest(RUN, card.ROWS))
    ((own, contest),) = seen
    assert own.tuned["tuning"][card.MATCHED]["setting"] == setting
    terms = find_preset(contest.rows[card.MATCHED]).terms
    assert terms.pop("entropy").weight == 0.25
    assert terms == find_preset(card.ROWS["lb"]).terms


def test_the_entropy_term_is_the_entropy(card, close):
    from controls import routing_entropy

    layer, mask = MoE(Router(LinearScorer(6, 4), TopK(2)), FeedForward(4, 6, 5)), torch.arange(20) > 4
    with record(layer) as tape:
        layer(torch.randn(20, 6), mask=mask)
    close(routing_entropy(tape[0]), token_entropy(tape[0].routing).value)


def test_a_weight_between_those_tried(card):
    from matching import interpolated

    tried = [(0.8, 0.01), (0.4, 1.0), (0.6, 0.1)]
    assert interpolated(0.7, tried) == pytest.approx(10**-1.5)
    assert (interpolated(0.9, tried), interpolated(0.1, tried)) == (0.01, 1.0)

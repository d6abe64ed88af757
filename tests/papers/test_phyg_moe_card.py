"""The PhyG-MoE card: its gates are what they are called, and accuracy above chance is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from seeds import shifted

from spectralmoe.experiments.cards import run_card
from spectralmoe.presets import find_preset
from spectralmoe.recorder import record

CARD = Path(__file__).parents[2] / "papers" / "phyg-moe"


@pytest.mark.full
def test_a_tiny_run_holds_every_row_and_field(card, tmp_path):
    small = card.card(card.run_of(21, 1, hidden=8), seeds=1)
    for ran in (len(card.ROWS), 0):  # a rerun does only what is missing
        count, _ = run_card(small, tmp_path, tmp_path / "work", 1, lambda *text: None)
        assert count == ran
    cells = {cell["row"]: cell for cell in json.loads((tmp_path / "results.json").read_text())}
    shares = [cells[row]["heavy"] for row in card.CHANCE]
    assert shares == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.05)
    assert (cells[card.TOLD]["heavy_single"], cells[card.TOLD]["heavy_pair"]) == pytest.approx((0, 1), abs=1e-6)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| spectrum, price 0.1 | content, price 0.1 | 1 |" in text
    assert "## Gates: means over prices" in text


def test_the_content_gate_is_as_large_and_reads_the_network(card):
    rows = {name: card.ROWS[f"{name}, price 0.1"] for name in ("spectrum", "content")}
    gates = {name: find_preset(row).make_router(16, 2, k=1) for name, row in rows.items()}
    numbers = {name: sum(p.numel() for p in gate.parameters()) for name, gate in gates.items()}
    assert numbers["spectrum"] == numbers["content"]
    assert [type(gate.selector).__name__ for gate in gates.values()] == ["NoisyTopK"] * 2
    assert not gates["content"].scorer.reads


def test_chance_calls_as_often_as_asked(card):
    x = torch.zeros(2000, 16)
    for share, (_, row) in zip((0, 0.25, 0.5, 0.75, 1), card.CHANCE.items(), strict=True):
        routing = find_preset(row).make_router(16, 2, k=1).eval()(x)
        assert float(routing.indices.float().mean()) == pytest.approx(share, abs=0.06)
        assert float(routing.weights.min()) > 1 - 1e-6


def test_the_told_gate_sends_two_jammers_to_the_heavy_expert_at_weight_one(card):
    from measure import ToldTask

    task = ToldTask(42)
    run = card.run_of(42, 1, hidden=8)
    network = task.build(run.model_copy(update={"router": card.ROWS[card.TOLD]}))
    batch = task.batch(torch.arange(42), np.random.default_rng(shifted(0)))
    with record(network) as tape:
        task.loss(network, batch)
    assert torch.equal(tape[0].routing.indices[:, 0] == 1, batch.labels >= 6)
    assert float(tape[0].routing.weights.min()) > 1 - 1e-6


def test_above_chance_is_less_the_line_between_the_shares(card):
    from measure import above_chance, by_gate

    chance = [{"row": row, "seed": 0, "accuracy": 50 + 10.0 * i, "heavy": i / 4} for i, row in enumerate(card.CHANCE)]
    told = {"row": card.TOLD, "seed": 0, "accuracy": 80.0, "heavy": 0.375}
    told |= {"expert_mflop": 1.0, "heavy_single": 0.0, "heavy_pair": 0.5}
    found = above_chance([*chance, told, {**told, "seed": 1}, {"row": card.TOLD, "seed": 0, "diverged": "at step 1"}])
    assert [cell.get("above_chance") for cell in found] == [0, 0, 0, 0, 0, 80 - 65, None, None]
    gates = {"told": [card.TOLD], "both": [card.TOLD, "chance 0%"]}
    assert [(cell["row"], cell["above_chance"]) for cell in by_gate([found[5]], gates)] == [("told", 15.0)]

"""The card of Replicate-and-Quantize: every row runs, and its imbalance of batches is that of forwards of batches."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
from spectralmoe.compression import replicate_and_quantize
from spectralmoe.diagnostics import load_imbalance
from spectralmoe.experiments.cards import run_card

CARD = Path(__file__).parents[2] / "papers" / "replicate-quantize"


def test_imbalance_inside_batches_is_that_of_forwards_of_their_own(card):
    from rows import imbalance_of

    layer, x = MoE(Router(LinearScorer(6, 5), TopK(2)), FeedForward(5, 6, 4)).eval(), torch.randn(48, 6)
    for model in (layer, replicate_and_quantize(layer, [x], copies=2).model):
        with record(model) as tape:
            model(x)
        assert imbalance_of(tape[0].routing, model, 1) == pytest.approx(load_imbalance(tape[0], physical=True))
        with record(model) as batches:
            for batch in x.split(8):
                model(batch)
        apart = [load_imbalance(item, physical=True) for item in batches]
        assert imbalance_of(tape[0].routing, model, 6) == pytest.approx(sum(apart) / len(apart))


def test_the_rows_differ_in_what_their_names_say(card):
    from rows import EXPERTS, ROWS, made

    layer = MoE(Router(LinearScorer(4, EXPERTS), TopK(1)), FeedForward(EXPERTS, 4, 6))
    network, x = nn.Sequential(layer, nn.Linear(4, 3)).eval(), torch.randn(60, 4)
    labelled = x, torch.randint(0, 3, (60,))
    reports = {row: made(network, options, 4, labelled, 0) for row, options in ROWS.items()}
    assert [row for row, report in reports.items() if report is None] == ["raw"]
    layers = {row: report.layers["0"] for row, report in reports.items() if report is not None}
    for row, done in layers.items():
        assert len(done.replicated) == (row != "quantise only")
        assert len(done.quantised) == (7 if row == "replicate, quantise all" else 3)
    sizes = {row: done.bytes_after for row, done in layers.items()}
    assert sizes["R&Q"] == sizes["R&Q, wanda"] == sizes["replicate, quantise random"]
    assert sizes["R&Q"] < sizes["R&Q, original full"] == sizes["random, original full"]


@pytest.mark.full
def test_a_tiny_run_holds_every_row_and_field(card, tmp_path):
    sizes = card.QUICK.steps[1].measure.keywords["sizes"]
    small = card.card(replace(sizes, calibrated=40, tested=64))
    for ran in (True, False):  # a rerun does only what is missing
        count, notes = run_card(small, tmp_path, tmp_path / "work", 1, lambda text, done, detail="": None)
        assert ((count > 0), notes) == (ran, [])
    cells = card.by_row(json.loads((tmp_path / "results.json").read_text()))
    assert {(cell["row"], cell["bits"]) for cell in cells} == {(row, bits) for row in card.ROWS for bits in card.BITS}
    assert all(cell.keys() >= {column.key for column in card.COLUMNS} for cell in cells)
    assert "replicate, quantise random" in (tmp_path / "RESULTS.md").read_text()

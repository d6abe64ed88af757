"""The language card: a tiny run end to end, equal starts and equal tuning, and what its own measure means."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers")

from spectralmoe import TopK
from spectralmoe.experiments.cards import run_card

CARD = Path(__file__).parents[2] / "papers" / "language"


@pytest.fixture(scope="module")
def sizes(card):
    return replace(card.QUICK_SIZES, data="text:pydoc", vocab=300, length=16, windows=16, tune_windows=8, measured=4)


@pytest.mark.full
def test_a_tiny_run_holds_every_row_and_field(card, sizes, tmp_path):
    from tables import BASELINES, ROUTING

    for ran in (True, False):  # a rerun does only what is missing
        count, notes = run_card(card.card(sizes), tmp_path, tmp_path / "work", 1, lambda text, done: None)
        assert ((count > 0), notes) == (ran, [])
    cells = json.loads((tmp_path / "results.json").read_text())
    assert [cell["row"] for cell in cells] == list(card.ROWS)
    routed = [cell for cell in cells if cell["row"] != "dense"]
    assert all(cell.keys() >= {column.key for column in ROUTING} for cell in routed)
    tuned = json.loads((tmp_path / "tuning.json").read_text())
    assert {len(row["tries"]) for row in tuned.values()} == {4}
    assert all(min(t["validation_bits_per_byte"] for t in row["tries"]) > 0 for row in tuned.values())
    text = (tmp_path / "RESULTS.md").read_text()
    assert all(f"| {one} | {other} | {sizes.seeds} |" in text for one, other in BASELINES)


def test_rows_start_alike_and_are_tuned_alike(card, sizes):
    from rows import tries
    from scratch import build, open_task

    task = open_task(sizes, sizes.tune_windows)
    networks = {row: build(row, task, 3).state_dict() for row in card.ROWS if row != "dense"}
    first = networks["linear"]
    for row, network in networks.items():
        for name, value in network.items():
            assert ".router." in name or torch.equal(value, first[name]), (row, name)
    assert {len(tries(row)) for row in card.ROWS} == {4}


def test_the_dense_row_is_as_wide_as_the_experts_of_a_token(card, sizes):
    from scratch import build, open_task

    from spectralmoe.experiments.compare.look import active_parameters

    task = open_task(sizes, sizes.tune_windows)
    dense, linear = (active_parameters(build(row, task, 0), task.example()) for row in ("dense", "linear"))
    assert 0.98 < dense / linear < 1.0  # the linear gates themselves


def test_domain_information_is_one_where_experts_and_domains_are_the_same(card):
    from scratch import domain_information

    from spectralmoe import LinearScorer, Router
    from spectralmoe.data.text_data import TextData
    from spectralmoe.data.text_sources import Document
    from spectralmoe.models import language_moe
    from spectralmoe.training.settings.text import Text
    from spectralmoe.training.tasks.text import TextTask

    documents = [Document("a", "a" * 64), Document("b", "b" * 64)]
    task = TextTask(
        TextData("text:two", ("a", "b"), dict.fromkeys(("train", "validation", "test"), documents)), Text(length=8)
    )
    model = language_moe(
        256,
        width=8,
        depth=1,
        heads=1,
        num_experts=2,
        hidden=4,
        router=lambda dim, experts: Router(LinearScorer(dim, experts), TopK(1)),
    )
    with torch.no_grad():
        model.blocks[0].attention.out.weight.zero_()
        model.embedding.weight.zero_()
        model.embedding.weight[ord("a"), 0] = model.embedding.weight[ord("b"), 1] = 1.0
        model.blocks[0].moe.router.scorer.weight.copy_(torch.eye(2, 8))
    assert domain_information(model, task) > 0.8  # windows across the border and the separators cost some
    with torch.no_grad():
        model.blocks[0].moe.router.scorer.weight.zero_()
    assert domain_information(model, task) in (None, 0.0)

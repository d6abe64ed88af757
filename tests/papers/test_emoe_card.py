"""The EMoE card: a tiny run end to end, what the committed results must hold, and the variants of part (c)."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from seeds import generator

from spectralmoe import FeedForward, MoE, Router, TopK, after_step, record
from spectralmoe.experiments.cards import run_card
from spectralmoe.experiments.evidence import difference, select
from spectralmoe.training.settings import parse
from spectralmoe.training.settings.toml_text import read_toml

CARD = Path(__file__).parents[2] / "papers" / "emoe"
ROWS = {"dense", "linear", "linear+load_balance", "linear+balanced", "EMoE faithful", "EMoE"}
FIELDS = {"row", "seed", "accuracy", "maxvio", "gini", "dead", "min_load_share", "output_cos2", "step_ms", "cpu"}


@pytest.fixture(scope="module")
def finished(card, tmp_path_factory):
    out = tmp_path_factory.mktemp("card")
    sizes = replace(
        card.QUICK_SIZES,
        epochs=1,
        train_size=256,
        tune_size=128,
        ablation_size=128,
        backbone_epochs=1,
        shots=(1,),
        shot_epochs=1,
    )
    for ran in (True, False):  # a rerun does only what is missing
        count, notes = run_card(card.card(sizes), out, out / "work", 1, lambda text, done: None)
        assert ((count > 0), notes) == (ran, [])
    return out


def cells_of(folder, name="results.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.mark.full
def test_a_tiny_run_holds_every_row_and_field(card, finished):
    cells = cells_of(finished)
    assert {cell["row"] for cell in cells} == ROWS
    assert all(cell.keys() >= FIELDS for cell in cells)
    assert {cell["variant"] for cell in cells_of(finished, "ablations.json")} == set(card.VARIANTS)
    assert {cell["row"] for cell in cells_of(finished, "fewshot.json")} == set(card.FEW_ROWS)
    assert (finished / "experts.svg").read_text(encoding="utf-8").count("<image") == 2 * 8 * 10
    tuned = cells_of(finished, "tuning.json")
    assert {len(found["tries"]) for found in tuned.values()} == {4}


def test_all_rows_start_with_the_same_weights(card):
    from measure import build_row
    from rows import ROWS as TABLE
    from rows import Setting

    from spectralmoe.data.image_data import load_data

    data = load_data("mnist5k")
    networks = {row: build_row(row, Setting(1e-3, TABLE[row].knobs[0]), data, 3) for row in TABLE}
    first = networks["linear"].state_dict()
    for row, network in networks.items():
        shared = {name: value for name, value in network.state_dict().items() if ".router." not in name}
        for name, value in shared.items():
            if name in first:
                assert torch.equal(value, first[name]), (row, name)
        assert row == "dense" or any(".mlp.experts.up" in name for name in shared)


def test_the_committed_settings_are_those_of_the_plan(card):
    assert json.loads((CARD / "settings.json").read_text()) == card.FULL.settings


def test_both_forms_of_emoe_are_tuned_in_tau_and_alike(card):
    from rows import ROWS as TABLE

    assert {len(row.tries()) for row in TABLE.values()} == {4}
    for name in ("EMoE", "EMoE faithful"):
        usual, other = TABLE[name].knobs
        assert [setting.knob for setting in TABLE[name].tries()] == [usual, usual, usual, other]
        assert [TABLE[name].router(tau)(64, 8).scorer.temperature for tau in (usual, other)] == [usual, other]
    assert TABLE["EMoE faithful"].knobs == (1.0, 0.1)


def test_a_variant_that_follows_the_covariance_does(card):
    from variants import FollowingBasis

    layer = MoE(Router(FollowingBasis(6, 4, momentum=0.5), TopK(1)), FeedForward(4, 6, 4))
    draw = generator(0)
    mixing = torch.randn(6, 6, generator=draw)
    mean, covariance = np.zeros(6), np.zeros((6, 6))
    for step in range(1, 30):
        x = torch.randn(200, 6, generator=draw) @ mixing + 1.0
        with record(layer) as tape:
            layer(x)
        after_step(layer, tape)
        weight, shift = max(1 / step, 0.5), x.double().numpy().mean(0) - mean
        own = np.cov(x.double().numpy().T, bias=True)
        covariance = (1 - weight) * covariance + weight * own + weight * (1 - weight) * np.outer(shift, shift)
        mean = mean + weight * shift
    scorer = layer.router.scorer
    assert np.allclose(scorer.covariance, covariance, atol=1e-3)
    top = np.linalg.eigh(covariance)[1][:, ::-1][:, :2]
    assert np.allclose(np.abs(top.T @ scorer.basis.detach().double().numpy()), np.eye(2), atol=0.1)


def test_the_settings_of_the_gpu_row_are_valid():
    from spectralmoe.training.settings.run import TrainSettings

    settings = parse(TrainSettings, read_toml(CARD / "vit-s.toml"), "vit-s.toml")
    assert settings.moe is not None
    assert settings.moe.experts == 8


def test_committed_results_are_of_the_agreed_form():
    cells = cells_of(CARD)
    keys = [(cell["row"], cell["seed"]) for cell in cells]
    assert len(keys) == len(set(keys))
    assert set(keys) == {(row, seed) for row in ROWS for seed in range(5)}
    for cell in cells:
        assert cell.keys() >= FIELDS
        assert 50 < cell["accuracy"] < 100
        assert cell["step_ms"] > 0
        if cell["row"] != "dense":
            assert 0 <= cell["min_load_share"] <= 1 / 8
            assert 0 <= cell["maxvio"] <= 7
            assert math.isfinite(cell["output_cos2"])


def test_committed_results_show_what_the_card_claims():
    cells = cells_of(CARD)
    assert min(cell["min_load_share"] for cell in select(cells, row="EMoE")) >= 1 / 32
    assert fmean(cell["maxvio"] for cell in select(cells, row="EMoE")) <= 1.0
    assert sum(cell["dead"] for cell in select(cells, row="EMoE")) == 0
    for row in ("linear", "linear+balanced"):
        likeness = difference(cells, "output_cos2", "EMoE", row)
        assert likeness.separated
        assert likeness.mean < 0
    for row in ("linear", "linear+load_balance", "linear+balanced"):
        assert not difference(cells, "accuracy", "EMoE", row).separated

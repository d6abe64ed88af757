"""Contest: rows that differ by their router alone are trained, tuned and measured alike."""

import json

import pytest
import torch

from spectralmoe.experiments.cards import (
    ROUTING_COLUMNS,
    Card,
    Contest,
    difference_panels,
    run_card,
    small_images,
    small_text,
    train_row,
)
from spectralmoe.experiments.cards.contest import measures
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.experiments.compare.setup import Tuned
from spectralmoe.training.settings.run import TrainSettings

RUN = TrainSettings(
    data="digits",
    depth=1,
    train_size=64,
    network={"width": 8, "num_experts": 4, "hidden": 4, "k": 2},
    optimization={"epochs": 1, "batch_size": 32},
)
ROWS = {"linear": "linear", "sr-moe": "sr-moe", "dense": "dense"}


def kept(trained):
    return {"twice": 2 * trained.history.validation}


def sized(run, cell):
    return run.model_copy(update={"train_size": cell["size"]})


def test_every_row_is_tuned_and_measured_alike(tmp_path):
    contest = Contest(RUN, ROWS, tries=2, tune_size=32, more=kept, vary=sized)
    steps = [contest.tuning(), contest.cells(2, size=[32, 64])]
    card = Card("A contest", "", contest.settings, steps, lambda stored: [], lambda stored: {})
    counts = [run_card(card, tmp_path, tmp_path / "work", 1, lambda *text: None)[0] for _ in range(2)]
    assert counts == [3 + 12, 0]
    tuned = json.loads((tmp_path / "tuning.json").read_text())
    tries = [[(each["lr"], each["strength"]) for each in row["tries"]] for row in tuned.values()]
    assert tries[0] == tries[1] == tries[2]
    assert tries[0][0] == (1.0, 1.0)
    cells = json.loads((tmp_path / "results.json").read_text())
    assert [(cell["row"], cell["size"], cell["seed"]) for cell in cells[:3]] == [(row, 32, 0) for row in ROWS]
    assert all(cell["twice"] == 2 * cell["validation_accuracy"] for cell in cells)
    routed = [cell for cell in cells if cell["row"] != "dense"]
    assert all(cell.keys() >= {column.key for column in ROUTING_COLUMNS} for cell in routed)


def test_the_choices_are_looked_at_in_as_many_samples_as_asked():
    trained = train_row(RUN, "linear", Tuned(), 0)
    found = [measures(trained, looked)["noise_flips"] for looked in (None, 1)]
    assert found[0] is not None
    assert found[1] is None  # of one image of digits: too few tokens
    contests = [Contest(RUN, ROWS, looked=looked) for looked in (None, 300)]
    assert [contest.settings.get("looked", "absent") for contest in contests] == ["absent", 300]


VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 1}
TIMM = {
    "data": "digits",
    "train_size": 32,
    "backbone": {"name": "vit_tiny_patch16_224", "arguments": VIT},
    "moe": {"kind": "replace_mlp", "init": "random", "experts": 4, "k": 2, "blocks": "last2"},
    "optimization": {"epochs": 1},
}


def test_the_task_is_that_of_the_run():
    smooth = {"label_smoothing": 0.1, "mixup": 0.2, "epochs": 1}
    task = train_row(TrainSettings(**{**TIMM, "image_size": 8, "optimization": smooth}), "linear", Tuned(), 0).task
    assert (task.label_smoothing, task.mixup) == (0.1, 0.2)


@pytest.mark.parametrize("run", [RUN, TrainSettings(**TIMM)], ids=["sr-moe network", "timm model"])
def test_rows_start_alike_but_for_their_routers(run):
    frozen = run.model_copy(update={"optimization": run.optimization.model_copy(update={"lr": 1e-30})})
    starts = [train_row(frozen, row, Tuned(), 3).network.state_dict() for row in ("linear", "cosine")]
    shared = [name for name in starts[0] if ".router." not in name]
    assert shared
    assert [name for name in shared if not torch.allclose(starts[0][name], starts[1][name], atol=1e-20)] == []


@pytest.mark.parametrize("run", [small_images(), small_text()], ids=["images", "text"])
def test_the_small_runs_are_settings_that_a_file_could_hold(run):
    assert TrainSettings.model_validate_json(run.model_dump_json(exclude_unset=True)) == run


def test_a_row_without_a_value_keeps_its_place_in_every_panel():
    cells = [{"row": row, "seed": s, "loss": s, "flips": s} for row in ("base", "one", "two") for s in (0, 1)]
    cells = [{**cell, "flips": None} if cell["row"] == "one" else cell for cell in cells]
    panels = difference_panels(cells, [Column(key, key, 1, "") for key in ("loss", "flips", "absent")], "base")
    assert [[(mark.label, mark.middle) for mark in panel.marks] for panel in panels] == [
        [("one", 0.0), ("two", 0.0)],
        [("one", None), ("two", 0.0)],
    ]

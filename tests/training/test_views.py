"""The task of several views: what is missing and what stands there, its loss and metrics, and the verbs on it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from seeds import generator, shifted
from torch.nn import functional as F

from spectralmoe import load, record, save
from spectralmoe.cli.app import run
from spectralmoe.data.image_data import load_data
from spectralmoe.data.views import VIEWS, present_views, scales_of, views_of
from spectralmoe.experiments.compare import CompareSettings
from spectralmoe.experiments.compare.columns import columns_of
from spectralmoe.instruments.samples import Place
from spectralmoe.saving import read_config
from spectralmoe.training.settings import parse
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.settings.views import Views
from spectralmoe.training.tasks import ViewsTask, open_task

SMALL = {"width": 8, "hidden": 4, "num_experts": 4}


@pytest.fixture(scope="module")
def digits():
    return load_data("digits").subset(60)


def settings(**values):
    optimization = {"seed": shifted(0), **values.pop("optimization", {})}
    given = {"data": "views:digits", "depth": 1, "network": SMALL, **values, "optimization": optimization}
    return parse(TrainSettings, given, "test")


def test_views_by_hand(close):
    image = torch.rand(1, 1, 4, 3)
    upper, lower, spectrum = views_of(image)
    assert upper.tolist() == [image[0, 0, :2].flatten().tolist()]
    assert lower.tolist() == [image[0, 0, 2:].flatten().tolist()]
    whole = torch.fft.fft2(image[0, 0].double())[:, :2].abs().log1p()
    close(spectrum, whole.flatten()[None])
    scales = scales_of(views_of(torch.rand(50, 1, 4, 3)))
    for view, plain, (mean, std) in zip(views_of(image, scales), views_of(image), scales, strict=True):
        close(view, (plain - mean) / std)


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.95])
def test_views_are_missing_at_the_rate_and_never_all(rate):
    present, count = present_views(4_000, rate, generator(0)), len(VIEWS)
    assert present.any(1).all()
    share = rate - rate**count / count  # of a sample that lost all, one comes back
    assert float((~present).float().mean()) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("placeholder", ["zeros", "noise", "pool"])
def test_what_stands_in_the_place_of_a_missing_view(digits, placeholder):
    task = ViewsTask(digits, Views(placeholder=placeholder, samples=60))
    chosen = torch.arange(40)
    rows = task.batch(chosen, np.random.default_rng(shifted(0)))
    again = task.batch(chosen, np.random.default_rng(shifted(0)))
    assert torch.equal(rows.inputs, again.inputs)
    assert torch.equal(rows.labels, digits.train.labels[:40])
    *values, flags = rows.inputs.split([*(view.shape[1] for view in task.train), len(VIEWS)], 1)
    for number, (view, whole) in enumerate(zip(values, task.train, strict=True)):
        there = flags[:, number].bool()
        assert 0 < int(there.sum()) < 40
        assert torch.equal(view[there], whole[:40][there])
        if placeholder == "zeros":
            assert not view[~there].any()
        elif placeholder == "pool":  # of all samples: their mean
            torch.testing.assert_close(view[~there], whole.mean(0).expand_as(view[~there]), rtol=1e-5, atol=1e-5)
        else:
            assert 0.8 < float(view[~there].std()) < 1.2


def test_placeholders_change_nothing_about_what_is_missing(digits):
    flags = [
        torch.cat(ViewsTask(digits, Views(placeholder=kind)).parts["test"])[:, -3:]
        for kind in ("zeros", "noise", "pool")
    ]
    assert torch.equal(flags[0], flags[1])
    assert torch.equal(flags[0], flags[2])


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_the_loss_is_cross_entropy_and_what_the_confidence_is_off(digits, weight, close):
    task = ViewsTask(digits, Views(confidence=weight))
    model = task.build(settings(router="confsmoe", depth=2))
    batch = task.batch(torch.arange(12), np.random.default_rng(shifted(1)))
    with record(model, keep=("confidence", "unweighed")) as tape:
        logits = model(batch.inputs)
    want = F.cross_entropy(logits, batch.labels)
    for item in tape:
        slots, sum_of_squares = item.order.tolist(), 0.0
        for slot, c, row in zip(slots, item.tensor("confidence"), item.tensor("unweighed"), strict=True):
            label = batch.labels[slot // 2 // len(VIEWS)]  # two slots a token, a token a view
            sum_of_squares += (c - model.head(row).softmax(-1)[label]).item() ** 2
        want = want + weight * sum_of_squares / len(slots) / 2
    close(task.loss(model, batch), want)


def test_metrics_are_those_of_each_rate(digits):
    task = ViewsTask(digits, Views(rates=(0.0, 0.7)))
    model = task.build(settings(router="linear")).train()
    scores = task.score(model, "test")
    assert model.training
    assert list(scores) == [metric.key for metric in task.metrics]
    model.eval()
    right = [model(inputs).argmax(-1) == digits.test.labels for inputs in task.parts["test"]]
    each = [100 * float(share.float().mean()) for share in right]
    assert scores["accuracy_missing_0"] == pytest.approx(each[0])
    assert scores["accuracy_missing_70"] == pytest.approx(each[1])
    assert scores["accuracy"] == pytest.approx(sum(each) / 2)
    assert [metric.key for metric in ViewsTask(digits, Views(rates=(0.5,))).metrics] == ["accuracy", "ece"]
    assert columns_of(task)[1].key == "accuracy_missing_0"


def test_settings_of_another_kind_are_refused(user_error):
    with user_error("[views]", "'digits'"):
        parse(TrainSettings, {"data": "digits", "views": {}}, "test")
    with user_error("mixup", "views:digits"):
        settings(optimization={"mixup": 0.1})
    with user_error("image_size"):
        parse(CompareSettings, {"data": "views:digits", "image_size": 8}, "test")
    with user_error("different"):
        settings(views={"rates": [0.5, 0.5]})
    assert "views" not in TrainSettings(data="digits").model_dump()
    assert "image_size" not in settings(views={}).model_dump()
    with user_error("samples=10", "5 of the pool"):
        open_task(settings(train_size=5))


def test_a_saved_network_is_scored_and_asked_again(digits, tmp_path, user_error):
    task, of_run = (
        ViewsTask(digits, Views(rates=(0.0, 0.5))),
        settings(router="confsmoe", train_size=60, views={"rates": [0.0, 0.5]}),
    )
    network = task.build(of_run)
    scores = task.score(network, "test")
    save(network, tmp_path / "one", meta=task.meta(of_run, scores, {}))
    values = read_config(tmp_path / "one")["meta"]
    loaded = load(tmp_path / "one")
    meta = ViewsTask.read_meta(loaded, values, tmp_path)
    again = ViewsTask.reopen(meta)
    assert again.score(loaded, "test") == pytest.approx(scores)
    assert again.scales == task.scales
    image = tmp_path / "digit.npy"
    np.save(image, digits.test.images[0, 0].numpy())
    ((shown,), _) = ViewsTask.predict(loaded, meta, [str(image)])
    assert shown.values["label"] == int(loaded.eval()(task.example()).argmax())
    held = task.held_out()
    assert held.inputs.shape == (len(digits.test), task.example().shape[1])
    assert held.describe(0, Place(0, 2, 3))["text"].endswith(", spectrum")
    with user_error("no file", "absent.png"):
        ViewsTask.predict(loaded, meta, ["absent.png"])
    with user_error("'digits'", "views:NAME"):
        ViewsTask.reopen(meta, "digits")
    with user_error("meta does not fit"):
        ViewsTask.read_meta(loaded, {**values, "image_size": [9, 9]}, tmp_path)


@pytest.mark.full
def test_a_comparison_and_the_verbs(tmp_path, capsys):
    file = tmp_path / "c.toml"
    file.write_text(
        'data = "views:digits"\nrouters = ["linear", "confsmoe"]\ndepths = [1]\nseeds = 1\ntrain_size = 40\n'
        "[network]\nwidth = 8\nhidden = 4\nnum_experts = 4\n[optimization]\nepochs = 1\nbatch_size = 20\n"
        "[views]\nrates = [0.0, 0.5]\n"
    )
    out = tmp_path / "out"
    assert run(["compare", "--config", str(file), "--out", str(out)]) == 0
    cells = json.loads((out / "results.json").read_text())
    cells = cells["cells"] if isinstance(cells, dict) else cells
    assert all({"accuracy_missing_0", "accuracy_missing_50", "ece", "entropy"} <= cell.keys() for cell in cells)
    folder = out / "models" / "confsmoe-depth1-seed0"
    capsys.readouterr()
    assert run(["evaluate", str(folder)]) == 0
    assert "50% missing" in capsys.readouterr().out
    image = tmp_path / "digit.npy"
    np.save(image, load_data("digits").test.images[0, 0].numpy())
    assert run(["predict", str(folder), str(image)]) == 0
    assert "digit.npy: " in capsys.readouterr().out
    assert load(folder).num_classes == 10
    assert run(["inspect", str(folder), "--out", str(tmp_path / "page.html")]) == 0

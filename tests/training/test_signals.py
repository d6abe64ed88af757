"""The task of signals: what it measures, and what the verbs do with a saved network of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from seeds import shifted

from spectralmoe import load
from spectralmoe.cli.app import run
from spectralmoe.data.interference import CLASSES
from spectralmoe.experiments.compare.settings import CompareSettings
from spectralmoe.presets import find_preset
from spectralmoe.recorder import record
from spectralmoe.training.settings import parse
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.tasks import SignalTask, open_task

SMALL = {"network": {"width": 4, "num_experts": 2, "hidden": 8, "k": 1}, "depth": 1, "train_size": 42}


def settings(**values):
    optimization = {"seed": shifted(0), **values.pop("optimization", {})}
    return parse(
        TrainSettings, {"data": "signals:interference", **SMALL, **values, "optimization": optimization}, "test"
    )


@pytest.fixture(scope="module")
def task():
    return SignalTask(42)


def test_parts_are_of_all_classes_and_differ(task):
    assert task.size == 42
    for part in ("train", "validation", "test"):
        counts = task.parts[part].labels.bincount(minlength=21)
        assert len(counts) == 21
        assert len(set(counts.tolist())) == 1
    assert not torch.equal(task.parts["test"].signals[:42], task.parts["train"].signals)
    assert task.fingerprint == SignalTask(42).fingerprint != SignalTask(63).fingerprint


def test_scores_by_hand(task):
    """Every record to one expert, by the bias of the router alone: the cost is that expert's."""
    network = task.build(settings(router="phyg-moe")).eval()
    layer, data = network.blocks[0].moe, task.parts["validation"]
    layer.router.scorer.weight.data.zero_()
    with torch.no_grad(), record(network, keep=("input",)) as tape:
        logits = network(data.signals)
    costs = layer.experts.costs(tape[0].input.shape[1:])
    assert costs[0] < costs[1]
    right = logits.argmax(1) == data.labels
    for expert in (0, 1):
        layer.router.scorer.bias.data = torch.tensor([1.0 - expert, float(expert)])
        scores = task.score(network, "validation")
        assert set(scores) == {metric.key for metric in task.metrics}
        assert scores["expert_mflop"] == pytest.approx(float(costs[expert]) / 1e6)
        for name in ("single", "pair"):
            assert scores[f"cost_{name}"] == pytest.approx(100 * float(costs[expert] / costs[1]))
    layer.router.scorer.bias.data.zero_()
    scores, single = task.score(network, "validation"), data.labels < 6
    assert scores["accuracy"] == pytest.approx(100 * float(right.float().mean()))
    assert scores["accuracy_single"] == pytest.approx(100 * float(right[single].float().mean()))
    assert scores["accuracy_pair"] == pytest.approx(100 * float(right[~single].float().mean()))


def test_the_price_goes_into_the_training(task):
    preset = find_preset("phyg-moe")
    network = task.build(settings(router="phyg-moe"))
    with record(network) as tape:
        loss = task.loss(network, task.batch(torch.arange(21), np.random.default_rng(shifted(0))))
    price = preset.terms["expected_cost"].fn(tape[0])
    assert 0 < price.item() < 1
    (loss + price).backward()
    assert network.blocks[0].moe.router.scorer.weight.grad.abs().sum() > 0


def test_what_does_not_fit_is_one_line(user_error):
    with user_error("unknown signals 'signals:gps'"):
        open_task(settings(data="signals:gps"))
    with user_error("hold_out is not about signals"):
        open_task(settings(hold_out="tone"))
    with user_error("mixup is about images"):
        open_task(settings(optimization={"mixup": 0.2}))
    with user_error("train_size must be at least 21"):
        open_task(settings(train_size=20))
    with user_error("no spare units"):
        SignalTask(21).build(settings(network={"spare": 2}))
    with user_error("this network gives none"):
        CompareSettings(data="digits", routers=("phyg-moe",)).check()
    CompareSettings(data="signals:interference", routers=("phyg-moe", "linear", "dense")).check()
    with user_error("router 'ermoe'", "takes rows of 1 dimensions, but unit=Sample"):
        CompareSettings(data="signals:interference", routers=("ermoe",)).check()


def call(capsys, *words):
    code = run([str(word) for word in words])
    out = capsys.readouterr()
    assert code == 0, out.err
    return out.out


def test_trained_evaluated_and_asked(tmp_path, capsys, user_error):
    file, model = tmp_path / "c.toml", tmp_path / "model"
    file.write_text(
        'data = "signals:interference"\nrouter = "phyg-moe"\ndepth = 1\ntrain_size = 42\n'
        "[network]\nwidth = 4\nnum_experts = 2\nhidden = 8\nk = 1\n[optimization]\nepochs = 1\n"
    )
    call(capsys, "train", "--config", file, "--out", model, "--json")
    scores = json.loads(call(capsys, "evaluate", model, "--json"))
    assert scores["records"] == 2100
    assert 0 < scores["expert_mflop"] < 1
    inspected = json.loads(call(capsys, "inspect", model, "--tokens", 300, "--json"))
    assert inspected["data"]["source"] == "320 test records of signals:interference"
    (layer,) = inspected["layers"]
    assert layer["load"]["max_vio"]["value"] is not None
    assert layer["examples"][0][0]["text"] in CLASSES
    signal = np.exp(1j * np.arange(512))
    np.save(tmp_path / "a.npy", signal)
    np.save(tmp_path / "b.npy", np.stack([signal.real, signal.imag]))
    one, two = json.loads(call(capsys, "predict", model, tmp_path / "a.npy", tmp_path / "b.npy", "--json"))
    assert one["class"] == two["class"]
    assert one["class"] in CLASSES
    assert one["probability"] == two["probability"]
    assert one["experts"].keys() == {"blocks.0.moe"}
    network, meta = load(model), SignalTask.read_meta(load(model), {**meta_of(model)}, model)
    np.save(tmp_path / "short.npy", signal[:100])
    np.save(tmp_path / "bad.npy", signal * np.nan)
    (tmp_path / "text.npy").write_text("no array")
    for name, words in (("short", "(100,)"), ("bad", "not finite"), ("text", "no .npy file"), ("none", "there is no")):
        with user_error(words):
            SignalTask.predict(network, meta, [str(tmp_path / f"{name}.npy")])


def meta_of(folder):
    from spectralmoe.saving import read_config

    return read_config(folder)["meta"]


@pytest.mark.full
def test_compared(tmp_path, capsys):
    words = ["compare", "--data", "signals:interference", "--routers", "phyg-moe,linear,dense", "--depths", 1]
    words += ["--seeds", 1, "--train-size", 42, "--epochs", 1, "--experts", 2, "--k", 1, "--out", tmp_path / "out"]
    (first, *_) = json.loads(call(capsys, *words, "--set", "network.width=4", "--set", "network.hidden=8", "--json"))
    assert {"accuracy_pair", "cost_pair", "expert_mflop", "active_flops", "entropy"} <= set(first)

"""Tasks: the loop, its checkpoints and a comparison need nothing else of what is learned."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spectralmoe import FeedForward, MoE, load
from spectralmoe.cli.app import run
from spectralmoe.experiments.compare.cell import run_cell
from spectralmoe.experiments.compare.settings import Cell, CompareSettings
from spectralmoe.experiments.compare.setup import Setup, Tuned
from spectralmoe.json_files import read_json
from spectralmoe.presets import find_preset
from spectralmoe.saving import read_config
from spectralmoe.training.loop import train
from spectralmoe.training.settings import Optimization, parse
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.tasks import TASKS, ImageTask, Metric, Task, open_task, task_of
from spectralmoe.training.tasks.classification import calibration_error, class_scores, macro_f1

D = 6
BUDGET = Optimization(epochs=2, batch_size=16, seed=3)


@dataclass(frozen=True)
class Vectors:
    """Inputs (B, D) and what they should become (B, D)."""

    x: torch.Tensor
    y: torch.Tensor

    def part(self, chosen, device):
        return Vectors(self.x[chosen].to(device), self.y[chosen].to(device))


class NoisyRotation(Task):
    """Regression: a fixed rotation of random vectors, with fresh noise on the inputs of every step."""

    name = "rotation:small"
    metrics = (Metric("error", "squared error", "mean squared error", "lower", digits=4),)

    def __init__(self, size=50):
        draw = torch.Generator().manual_seed(5)
        rotation, _ = torch.linalg.qr(torch.randn(D, D, generator=draw))
        inputs = {
            part: torch.randn(n, D, generator=draw) for part, n in (("train", size), ("validation", 20), ("test", 30))
        }
        self.parts = {part: Vectors(x, x @ rotation) for part, x in inputs.items()}
        self.scored = []

    @classmethod
    def open(cls, settings, data_dir=None, download=False):
        return cls(settings.train_size or 50)

    @property
    def size(self):
        return len(self.parts["train"].x)

    @property
    def fingerprint(self):
        return f"rotation of {self.size}"

    def build(self, settings):
        torch.manual_seed(settings.optimization.seed)
        router = find_preset(settings.row).routers(settings.network.k)
        experts = FeedForward(settings.network.num_experts, D, settings.network.hidden)
        return nn.Sequential(MoE(router(D, settings.network.num_experts), experts), nn.Linear(D, D))

    def batch(self, indices, draw):
        chosen = self.parts["train"].part(indices, torch.device("cpu"))
        return Vectors(chosen.x + 0.01 * torch.from_numpy(draw.standard_normal(chosen.x.shape)).float(), chosen.y)

    def loss(self, model, batch):
        return F.mse_loss(model(batch.x).float(), batch.y)

    def score(self, model, part):
        self.scored.append(part)
        with torch.no_grad():
            return {"error": float(F.mse_loss(model.eval()(self.parts[part].x), self.parts[part].y))}

    def example(self):
        return self.parts["test"].x[:1]


def settings(**values):
    network = {"num_experts": 4, "hidden": 8, "k": 2}
    return parse(TrainSettings, {"data": "rotation:small", "network": network, **values}, "test")


def bits(model):
    return [value.numpy().tobytes() for value in model.state_dict().values()]


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [3, 6])
def test_a_task_of_ones_own_is_trained_and_gone_on_with_to_the_same_bits(stop_at, tmp_path, monkeypatch):
    monkeypatch.setattr("spectralmoe.training.loop._CHECKPOINT_SECONDS", 0.0)
    task, calls = NoisyRotation(), []
    whole = task.build(settings())
    history = train(whole, task, BUDGET)
    assert [set(epoch) for epoch in history.epochs] == [{"loss", "validation_error", "seconds"}] * 2
    assert history.validation == history.epochs[-1]["validation_error"] == task.score(whole, "validation")["error"]

    def stop(share):
        calls.append(share)
        if len(calls) == stop_at:
            raise Stop

    path = tmp_path / "training.safetensors"
    with pytest.raises(Stop):
        train(task.build(settings()), task, BUDGET, checkpoint=path, progress=stop)
    resumed = task.build(settings(optimization={"seed": 9}))
    assert train(resumed, task, BUDGET, checkpoint=path).validation == history.validation
    assert bits(resumed) == bits(whole)


def test_training_never_scores_the_test_part_and_learns():
    task = NoisyRotation(200)
    network = task.build(settings())
    before = task.score(network, "test")["error"]
    task.scored.clear()
    train(network, task, Optimization(epochs=20, batch_size=16, lr=1e-2))
    assert set(task.scored) == {"validation"}
    assert task.score(network, "test")["error"] < 0.5 * before


def test_a_cell_of_a_comparison_has_the_metrics_of_its_task(tmp_path):
    compared = CompareSettings(
        data="rotation:small", network={"num_experts": 4, "hidden": 8}, optimization={"epochs": 2, "batch_size": 16}
    )
    setup = Setup(compared, NoisyRotation(), tmp_path, torch.device("cpu"))
    row = run_cell(Cell("linear+balanced", 1, 3), Tuned(), setup, lambda share: None)
    assert math.isfinite(row["error"])
    assert math.isfinite(row["validation_error"])
    assert len(row["loads"]["0"]) == 4
    assert not {"accuracy", "interference", "trials"} & set(row)
    network = setup.task.build(compared.run_of(Cell("linear+balanced", 1, 3)))
    train(network, setup.task, Optimization(epochs=2, batch_size=16, seed=3))
    assert row["error"] == setup.task.score(network, "test")["error"]


def test_the_name_of_the_data_finds_the_task(monkeypatch, user_error):
    monkeypatch.setitem(TASKS, "rotation", NoisyRotation)
    assert isinstance(open_task(settings(train_size=7)), NoisyRotation)
    assert isinstance(open_task(settings(data="digits")), ImageTask)
    with user_error("unknown data set 'movies:new'"):
        open_task(settings(data="movies:new"))


def test_verbs_say_what_a_task_of_ones_own_leaves_out(user_error, tmp_path, monkeypatch):
    task, network = NoisyRotation(), nn.Linear(D, D)
    with user_error("predict: not for a network that has a task of its own"):
        NoisyRotation.predict(network, None, ["x"])
    for call in (task.held_out, lambda: task.write_wrong(network, tmp_path), lambda: NoisyRotation.reopen(None)):
        with user_error("not for a network that has a task of its own"):
            call()
    assert task.summary({"error": 0.25}).text == "0.2500 squared error on the test part of rotation:small"
    monkeypatch.setitem(TASKS, "rotation", NoisyRotation)
    assert task_of("rotation:small") is NoisyRotation
    assert task_of("rotation") is task_of("folder:rotation:small") is task_of(None) is ImageTask


def test_a_network_of_two_kinds_is_one_line(user_error):
    with user_error("test", "depth belongs to an SR-MoE network"):
        settings(network={}, backbone={"name": "vit_tiny_patch16_224"}, depth=3)
    with user_error("test", "[moe]", "no section [backbone]"):
        settings(moe={})


def test_the_command_line_names_the_network(tmp_path, capsys):
    file = tmp_path / "c.toml"
    file.write_text('data = "digits"\n[optimization]\nepochs = 1\n')
    for network, label in (("timm:vit_tiny_patch16_224", "vit_tiny_patch16_224"), ("sr-moe", "sr-moe")):
        assert run(["train", "--config", str(file), "--network", network, "--print-config", "--json"]) == 0
        assert TrainSettings(**json.loads(capsys.readouterr().out)).label == label
    assert run(["train", "--config", str(file), "--network", "tim:x", "--print-config"]) == 2
    assert "unknown network 'tim:x'" in capsys.readouterr().err
    tiny = "{img_size = 8, patch_size = 4, embed_dim = 16, depth = 2, num_heads = 2}"
    compared = ["compare", "--data", "digits", "--routers", "linear", "--depths", "1", "--seeds", "1", "--trials", "1"]
    compared += ["--train-size", "60", "--epochs", "1", "--network", "timm:vit_tiny_patch16_224"]
    out = tmp_path / "out"
    assert run([*compared, "--set", f"backbone.arguments={tiny}", "--columns", "nll", "--out", str(out), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert {"accuracy", "macro_f1", "nll", "ece", "max_vio", "interference"} <= set(row)
    assert load(out / "models" / "linear-depth1-seed0").name == "vit_tiny_patch16_224"


def test_class_scores_by_hand():
    """Four samples of classes 0, 0, 1, 3; class 2 neither is predicted nor labels one."""
    share = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1], [0.1, 0.8, 0.05, 0.05], [0.3, 0.3, 0.1, 0.3]])
    share[3, 3] += 1e-3  # no tie
    labels = torch.tensor([0, 0, 1, 3])
    found = class_scores(share.log(), labels)
    assert found["accuracy"] == 75
    assert found["macro_f1"] == pytest.approx(100 * (2 / 3 + 2 / 3 + 1) / 3)
    assert found["nll"] == pytest.approx(-sum(map(math.log, (0.7, 0.2, 0.8, 0.301 / 1.001))) / 4, rel=1e-5)
    confident = 0.301 / 1.001  # bins of a fifteenth: 0.7 and 0.6 and 0.8 and 0.3007 lie in bins of their own
    assert found["ece"] == pytest.approx(25 * (0.3 + 0.6 + 0.2 + 1 - confident), rel=1e-5)


def test_scores_are_their_equations_one_sample_at_a_time():
    logits, labels = 2 * torch.randn(300, 5, dtype=torch.float64), torch.randint(0, 5, (300,))
    bins = [[] for _ in range(15)]
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        norm = sum(math.exp(value) for value in row)
        confidence = max(math.exp(value) / norm for value in row)
        place = next(b for b in range(15) if confidence <= (b + 1) / 15 + 1e-12)
        bins[place].append((row.index(max(row)) == label, confidence))
    gaps = [abs(sum(right for right, _ in b) - sum(c for _, c in b)) for b in bins]
    assert calibration_error(logits, labels) == pytest.approx(sum(gaps) / 300)
    predictions = logits.argmax(-1).tolist()
    scores = []
    for c in range(5):
        true = sum(p == y == c for p, y in zip(predictions, labels.tolist(), strict=True))
        scores.append(2 * true / (predictions.count(c) + labels.tolist().count(c)))
    assert macro_f1(logits.argmax(-1), labels) == pytest.approx(sum(scores) / 5)


def test_a_calibrated_model_has_no_calibration_error():
    """Of 10 samples with confidence 0.8 eight are right."""
    logits = torch.tensor([0.8, 0.2]).log().repeat(10, 1)
    assert calibration_error(logits, torch.tensor([0] * 8 + [1] * 2)) == pytest.approx(0, abs=1e-6)
    assert math.isnan(calibration_error(torch.full((2, 2), torch.nan), torch.tensor([0, 1])))


@pytest.mark.parametrize("router", ["linear", "sr-moe"])
def test_timm_models_are_rows_too(router, tmp_path):
    """Experts in the MLPs of the last block; what is saved tells how it was trained."""
    tiny = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    compared = CompareSettings(
        data="digits", backbone={"name": "vit_tiny_patch16_224", "arguments": tiny}, train_size=100, trials=2,
        network={"num_experts": 4}, optimization={"epochs": 1},
    )  # fmt: skip
    cell = Cell(router, 1, 0)
    setup = Setup(compared, open_task(compared.run_of(cell)), tmp_path, torch.device("cpu"))
    row = run_cell(cell, Tuned(), setup, lambda share: None)
    assert list(row["loads"]) == ["backbone.blocks.1.mlp"]
    assert row["trials"] == 2
    assert {"accuracy", "macro_f1", "nll", "ece", "validation_accuracy"} <= set(row)
    meta = read_config(tmp_path / "models" / cell.name)["meta"]
    assert meta["settings"]["moe"]["router"] == router
    assert read_json(tmp_path / "models" / cell.name / "config.json")["meta"]["results"]["test_images"] == 539

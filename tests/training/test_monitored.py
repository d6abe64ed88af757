"""A monitor in the training loop: it changes nothing, and a run that was stopped has each step in its file once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

from spectralmoe import record
from spectralmoe.cli.app import run
from spectralmoe.data.image_data import load_data
from spectralmoe.instruments.cures import THRESHOLDS
from spectralmoe.instruments.monitor import Monitor
from spectralmoe.instruments.monitor_log import read_monitor
from spectralmoe.training.loop import Diverged, train
from spectralmoe.training.network import build_network
from spectralmoe.training.settings import Network, Optimization
from spectralmoe.training.tasks import ImageTask

SMALL = Network(width=16, num_experts=4, hidden=8, k=2)
BUDGET = Optimization(epochs=2, batch_size=50, seed=3)  # 300 images, of which 240 train: 5 steps an epoch
TOML = """
data = "digits"
router = "linear"
depth = 2
train_size = 300
[network]
width = 16
num_experts = 4
hidden = 8
[optimization]
epochs = 2
batch_size = 50
lr = 1.0
"""
VIT = """
data = "digits"
train_size = 300
[backbone]
name = "vit_tiny_patch16_224"
gradient_checkpointing = true
arguments = { img_size = 8, patch_size = 4, embed_dim = 16, depth = 2, num_heads = 2 }
[moe]
router = {preset = "emoe-faithful", rank = 8}
experts = 4
bottleneck = 4
blocks = "all"
tokens = "all"
[optimization]
epochs = 1
batch_size = 50
"""


@pytest.fixture(scope="module")
def data():
    return load_data("digits").subset(300)


def bits(model):
    return [value.numpy().tobytes() for value in model.state_dict().values()]


def lines(path, kind):
    return [line for line in read_monitor(path) if line["kind"] == kind]


def test_the_run_is_the_same_and_evaluation_is_left_out(data, tmp_path):
    plain, watched = (build_network(data, SMALL, "sr-moe", 2, seed=0) for _ in range(2))
    train(plain, ImageTask(data), BUDGET)
    with Monitor(watched, tmp_path / "m.jsonl", every=3) as monitor:
        train(watched, ImageTask(data), BUDGET, monitor=monitor)
    assert bits(watched) == bits(plain)
    steps = lines(tmp_path / "m.jsonl", "step")
    batches = -(-len(data.train) // 50)
    total = 2 * batches
    assert [line["step"] for line in steps] == [*range(3, total + 1, 3), *([total] if total % 3 else [])]
    assert sum(line["tokens"] for line in steps) == 2 * len(data.train)


def test_a_run_that_goes_on_has_each_step_once(data, tmp_path, monkeypatch):
    monkeypatch.setattr("spectralmoe.training.loop._CHECKPOINT_SECONDS", 0.0)  # a checkpoint after every step
    whole, path, checkpoint = tmp_path / "whole.jsonl", tmp_path / "m.jsonl", tmp_path / "c.safetensors"
    network = build_network(data, SMALL, "sr-moe", 2, seed=0)
    with Monitor(network, whole, every=2, layers=True) as monitor:
        train(network, ImageTask(data), BUDGET, monitor=monitor)

    calls = 0

    def stop(share):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    for progress in (stop, None):
        network = build_network(data, SMALL, "sr-moe", 2, seed=0)
        try:
            with Monitor(network, path, every=2, layers=True) as monitor:
                train(network, ImageTask(data), BUDGET, monitor=monitor, checkpoint=checkpoint, progress=progress)
        except KeyboardInterrupt:
            assert [line["step"] for line in lines(path, "step")] == [2, 4, 5]
    ours, theirs = lines(path, "step"), lines(whole, "step")
    assert [line["step"] for line in ours] == [2, 4, 5, *(line["step"] for line in theirs[2:])]
    assert ours[:2] + ours[4:] == theirs[:2] + theirs[3:]
    assert ours[2]["tokens"] + ours[3]["tokens"] == theirs[2]["tokens"]


def test_what_led_to_a_divergence_is_written(data, tmp_path, monkeypatch):
    network = build_network(data, SMALL, "linear", 2, seed=0)

    def loss(task, model, batch):
        model(batch.images)
        return losses.pop(0)

    monkeypatch.setattr(ImageTask, "loss", loss)
    losses = [torch.tensor(1.0, requires_grad=True)] * 3 + [torch.tensor(torch.nan, requires_grad=True)]
    with pytest.raises(Diverged), Monitor(network, tmp_path / "m.jsonl") as monitor:
        train(network, ImageTask(data), BUDGET, monitor=monitor)
    assert [line["step"] for line in lines(tmp_path / "m.jsonl", "step")] == [3]
    with record(network) as tape:
        network(data.train.images[:3])
    assert len(tape) == 2


def test_the_command_writes_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(THRESHOLDS, "imbalance", -1.0)
    config, out = tmp_path / "f.toml", tmp_path / "out"
    config.write_text(TOML)
    command = ["train", "--config", str(config), "--out", str(out)]
    assert run([*command, "--monitor", "--every", "4"]) == 0
    found, said = read_monitor(out / "monitor.jsonl"), capsys.readouterr()
    assert found[0]["title"] == "linear"
    assert [layer["name"] for layer in found[0]["layers"]] == ["stages.0.moe", "stages.1.moe"]
    total = found[-1]["step"]
    assert [line["step"] for line in found if line["kind"] == "step"][:2] == [4, 8]
    assert [line["step"] for line in found if line["kind"] == "load"][-1] == total
    assert {(line["step"], line["finding"]["kind"]) for line in found if line["kind"] == "finding"} == {
        (4, "imbalance")
    }
    assert said.err.count("layer 0: the busiest expert carries") == 1
    before = (out / "monitor.jsonl").read_text()
    assert run([*command, "--monitor", "--every", "4"]) == 0  # a finished run goes on with nothing
    assert (out / "monitor.jsonl").read_text() == before
    assert run([*command, "--every", "4"]) == 2
    assert "add --monitor" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.slow
def test_a_vision_model_on_two_processes(tmp_path):
    config = tmp_path / "f.toml"
    config.write_text(VIT)
    command = ["train", "--config", str(config), "--monitor", "--every", "2", "--out"]
    assert run([*command, str(tmp_path / "one")]) == 0
    together([*command, str(tmp_path / "two"), "--parallel", "fsdp2"])
    one, two = (read_monitor(tmp_path / name / "monitor.jsonl") for name in ("one", "two"))
    assert two[0] == one[0]
    steps, others = ([line for line in found if line["kind"] == "step"] for found in (one, two))
    assert [(line["step"], line["tokens"]) for line in others] == [(line["step"], line["tokens"]) for line in steps]
    first, other = (next(line for line in found if line["kind"] == "load")["shares"] for found in (one, two))
    for name, shares in first.items():  # of the first two steps; rounding may send a token elsewhere
        assert other[name] == pytest.approx(shares, abs=0.005)


def together(command):
    """One run on two processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "spectralmoe", *command],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)

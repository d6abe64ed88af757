"""``spectralmoe replicate``: what it writes is a model like others, evaluated by the same verb."""

import json

import pytest
import torch

from spectralmoe import load, save
from spectralmoe.layers import moe_layers
from spectralmoe.saving import read_config
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.tasks.images import ImageTask

RUN = TrainSettings(
    data="digits", depth=1, router="linear", network={"width": 12, "num_experts": 4, "hidden": 4, "k": 1}
)


@pytest.fixture
def model(tmp_path):
    """An untrained network of the digits."""
    task = ImageTask.open(RUN)
    network = task.build(RUN)
    save(network, tmp_path / "model", meta=task.meta(RUN, {}, {}))
    return tmp_path / "model"


def test_the_written_model_is_what_the_report_says(model, tmp_path, call):
    out, options = tmp_path / "out", ["--bits", 2, "--quantize", 2, "--samples", 100]
    code, text, _ = call("replicate", model, "--out", out, *options, "--json")
    assert code == 0
    result = json.loads(text)
    (name, layer), (made, old) = *result["layers"].items(), (load(out), load(model))
    assert moe_layers(made)[name].experts.num_experts == 5
    assert not torch.equal(moe_layers(made)[name].experts.up[:4], moe_layers(old)[name].experts.up)
    assert len(layer["replicated"]) == 1
    assert len(layer["quantised"]) == 2
    assert sum(layer["load"]) == 100
    assert layer["imbalance"]["after"] <= layer["imbalance"]["before"] * 5 / 4
    assert result["bytes"]["after"] < result["bytes"]["before"]
    code, text, _ = call("evaluate", out, "--json")
    assert code == 0
    assert json.loads(text)["accuracy"] == pytest.approx(result["test"]["after"]["accuracy"])
    assert read_config(out)["meta"]["settings"] == read_config(model)["meta"]["settings"]


def test_it_shows_a_table_and_names_mistakes(model, tmp_path, call, refused):
    options = ["--importance", "frequency", "--copies", 0]
    code, text, _ = call("replicate", model, "--out", tmp_path / "out", *options)
    assert code == 0
    assert "none" in text
    assert "on the test part" in text
    assert "is not empty" in refused("replicate", model, "--out", tmp_path / "out")
    assert "got 1" in refused("replicate", model, "--out", tmp_path / "b", "--bits", 1)
    assert "unknown importance" in refused("replicate", model, "--out", tmp_path / "c", "--importance", "size")

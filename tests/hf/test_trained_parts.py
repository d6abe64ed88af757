"""What is trained is what was asked for."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from families import build

from spectralmoe.hf.training.trained_parts import chosen_layers, train_only

GATES = {f"model.layers.{place}.mlp.gate.weight" for place in range(3)}
EXPERTS = {f"model.layers.{place}.mlp.experts.{name}" for place in range(3) for name in ("gate_up_proj", "down_proj")}


def trained(parts, layers):
    model = build("mixtral")
    train_only(model, parts, layers)
    return {name for name, value in model.named_parameters() if value.requires_grad}


def test_parts_of_all_layers():
    assert trained(["routers"], "all") == GATES
    assert trained(["experts"], "all") == EXPERTS
    assert trained(["routers", "experts"], "all") == GATES | EXPERTS
    assert trained(["all"], "all") == {name for name, _ in build("mixtral").named_parameters()}


def test_parts_of_the_last_layers():
    assert trained(["routers"], "last2") == GATES - {"model.layers.0.mlp.gate.weight"}
    assert trained(["all"], "last1") == {
        name for name, _ in build("mixtral").named_parameters() if ".layers.2." in name
    }


def test_layers_between_dense_ones():
    assert [layer.number for layer in chosen_layers(build("qwen3_moe"), "last1")] == [3]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("lsat2", ["unknown layers 'lsat2'", "did you mean 'last2'"]),
        ("last4", ["the model has 3 MoE layers"]),
        ("last0", ["the model has 3 MoE layers"]),
    ],
)
def test_layers_that_are_not_there(layers, words, user_error):
    with user_error(*words):
        chosen_layers(build("mixtral"), layers)

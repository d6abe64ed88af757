"""Routers frozen, or trained alone, in stock and swapped models."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from families import FAMILIES, batch
from torch import nn

from spectralmoe.hf import freeze_routers, swap_routers, train_only_routers
from spectralmoe.hf.layers import find_layers


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("swapped", [False, True], ids=["stock", "swapped"])
def test_routers_alone_or_all_but_routers(swapped):
    model = FAMILIES["gpt_oss"]().train()
    if swapped:
        swap_routers(model)
    routers = {
        f"{layer.router_path}.{name}" for layer in find_layers(model) for name, _ in layer.router.named_parameters()
    }
    whole = trained(model)
    train_only_routers(model)
    assert trained(model) == routers
    inputs = batch(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == routers
    model.requires_grad_(True)
    freeze_routers(model)
    assert trained(model) == whole - routers


def test_a_dense_model_has_none(user_error):
    for change in (freeze_routers, train_only_routers):
        with user_error("no MoE layer"):
            change(nn.Linear(2, 2))

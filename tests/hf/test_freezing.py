"""Routers or experts frozen, or routers trained alone, in stock and swapped models and in our own."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import torch
from families import FAMILIES, batch
from torch import nn

from spectralmoe import Adapter, BasisScorer, EigenExperts, FeedForward, LinearScorer, MoE, Router, TopK, attach
from spectralmoe.hf import freeze_experts, freeze_routers, swap_routers, train_only_routers
from spectralmoe.hf.layers import find_layers
from spectralmoe.models import language_moe
from spectralmoe.selectors import Balanced


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


@pytest.mark.parametrize("swapped", [None, "*", "*.0.*"], ids=["stock", "swapped", "one swapped"])
@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_all_but_experts(family, swapped):
    model = FAMILIES[family]().train()
    if swapped:
        swap_routers(model, layers=swapped)
    whole = trained(model)
    freeze_experts(model)
    assert trained(model) == {name for name in whole if ".experts." not in name}
    assert len(trained(model)) < len(whole)
    inputs = batch(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if ".experts." in name)


def test_a_network_of_our_own():
    """Whatever wraps it; frozen experts stay as they are while their routers learn, selection biases among them."""
    router = lambda dim, experts: Router(LinearScorer(dim, experts), Balanced(2))  # noqa: E731
    network = language_moe(9, width=8, depth=2, heads=2, num_experts=4, hidden=4, router=router)
    freeze_experts(torch.compile(network, backend="eager"))
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in network.named_parameters() if ".experts." in name} != set()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    attach(optimizer, network)
    network(torch.arange(8)[None]).square().mean().backward()
    optimizer.step()
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert not moved & frozen
    assert {"blocks.1.moe.router.scorer.weight", "blocks.1.moe.router.selector.bias"} <= moved


def test_shared_experts_go_on():
    layer = MoE(Router(LinearScorer(8, 4), TopK(2)), Adapter(4, 8, 2), shared=FeedForward(1, 8, 4))
    freeze_experts(layer)
    assert {name.partition(".")[0] for name in trained(layer)} == {"router", "shared"}


def test_a_router_that_reads_the_experts_is_not_frozen_without_them(user_error):
    layer = MoE(Router(BasisScorer(8, 4, score="energy"), TopK(2)), EigenExperts(4, 8, 2))
    for change in (freeze_routers, train_only_routers):
        with user_error("BasisScorer", "no parameters of its own", "freeze_experts(model)"):
            change(layer)
        assert trained(layer) == {name for name, _ in layer.named_parameters()}
    freeze_experts(layer)
    assert layer.router.is_frozen


def test_a_dense_model_has_none(user_error):
    for change in (freeze_experts, freeze_routers, train_only_routers):
        with user_error("no MoE layer"):
            change(nn.Linear(2, 2))

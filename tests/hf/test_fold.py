"""Swapped routers back in stock gates: exactly where they fit, by the nearest gate else; after it nothing is ours."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from families import FAMILIES, MORE, batch, build
from torch import nn

from spectralmoe import record
from spectralmoe.hf import distill_to_gate, fold_routers, swap_routers
from spectralmoe.hf.routers.places import swapped_routers
from spectralmoe.layers import moe_layers
from spectralmoe.selectors import Balanced

pytest.importorskip("transformers")

SOME = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe")
every_family = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in SOME else pytest.mark.full) for name in (*FAMILIES, *MORE)]
)


@functools.cache
def stock_of(family: str) -> Any:
    """The tiny model, not to be changed."""
    return build(family)


def swapped_of(family: str, *args: Any, **options: Any) -> Any:
    """A copy of it with routers of this library."""
    model = copy.deepcopy(stock_of(family))
    swap_routers(model, *args, **options)
    return model


@torch.no_grad()
def move(model: Any) -> None:
    """Train the swapped routers, as it were: their matrices, biases and selection biases are other ones."""
    for layer in swapped_routers(model).values():
        for parameter in layer.router.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        for part in layer.router.selector.modules():
            if isinstance(part, Balanced):
                part.bias += 0.3 * torch.randn_like(part.bias)


@every_family
@torch.no_grad()
def test_folded_is_the_same_model_and_a_stock_one(family, tmp_path):
    model, stock = swapped_of(family), stock_of(family)
    move(model)
    inputs = batch(model, 4)
    before = model(**inputs).logits
    fold_routers(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {
        name: p.requires_grad for name, p in stock.named_parameters()
    }
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    for folded in (model, loaded):
        torch.testing.assert_close(folded(**inputs).logits, before, rtol=0, atol=1e-5)
    assert (before - stock(**inputs).logits).abs().max() > 0.01


@every_family
def test_a_gate_that_was_distilled_serves_most_tokens_alike(family, tmp_path):
    selector = {"type": "topk", "k": 1} if family == "switch" else "topk"
    teacher = swapped_of(family, "cosine", selector, init="fresh")
    model, inputs = copy.deepcopy(teacher), batch(teacher, 4)
    agreements = distill_to_gate(model, [inputs])
    assert list(agreements) == list(moe_layers(teacher))
    assert [type(module) for module in model.modules()] == [type(module) for module in stock_of(family).modules()]
    for before, after in agreements.values():
        assert after > before
        assert after > (0.4 if family in ("deepseek_v3", "gpt_oss") else 0.9)  # few groups, or few experts for a fit
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = type(model).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_agreement_is_that_of_the_tokens_that_reach_the_layer():
    """Of the first layer, whose tokens are the same before and after."""
    first, teacher = "model.layers.0.mlp", swapped_of("mixtral", "prototype", init="fresh")
    model, inputs = copy.deepcopy(teacher), batch(teacher, 3)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, :9] = 0
    agreements, chosen = distill_to_gate(model, [inputs, batch(teacher, 2, seed=1)]), []
    for each in (teacher, model):
        with record(each) as tape:
            each(**inputs)
            each(**batch(teacher, 2, seed=1))
        members = [item.routing.members() for item in tape if item.name == first]
        chosen.append(torch.cat([members[0][inputs["attention_mask"].flatten().bool()], members[1]]))
    assert agreements[first].after == pytest.approx(float((chosen[0] == chosen[1]).all(-1).double().mean()))


@torch.no_grad()
def test_what_can_be_folded_is_folded_exactly():
    model, stock = swapped_of("qwen3_moe", layers="model.layers.1.*"), stock_of("qwen3_moe")
    swap_routers(model, "prototype", init="fresh", layers="model.layers.3.*")
    gate = swapped_routers(model)["model.layers.1.mlp"].router.scorer.weight.clone()
    agreements = distill_to_gate(model, [batch(model, 4)])
    assert agreements["model.layers.1.mlp"].after == 1
    assert torch.equal(model.model.layers[1].mlp.gate.weight, gate)
    assert not torch.equal(model.model.layers[3].mlp.gate.weight, stock.model.layers[3].mlp.gate.weight)


def test_a_folded_model_trains_and_another_one_stays_swapped():
    one, other = swapped_of("mixtral"), swapped_of("mixtral")
    fold_routers(one)
    ids = batch(one)["input_ids"]
    one.train()(input_ids=ids, labels=ids).loss.backward()
    assert one.model.layers[0].mlp.gate.weight.grad.any()
    assert len(swapped_routers(other)) == 3
    assert other.model._forward_pre_hooks


def test_copies_and_half_precision_fold():
    model = copy.deepcopy(swapped_of("deepseek_v3")).to(torch.bfloat16)
    move(model)
    weight = swapped_routers(model)["model.layers.1.mlp"].router.scorer.weight
    fold_routers(model)
    assert weight.dtype == torch.float32
    assert torch.equal(model.model.layers[1].mlp.gate.weight, weight.to(torch.bfloat16))


def refused(model: Any, user_error: Any, *words: str) -> None:
    """The model is as it was."""
    before, routers = {name: value.clone() for name, value in model.state_dict().items()}, swapped_routers(model)
    with user_error("fold_routers", "distill_to_gate(model, batches)", *words):
        fold_routers(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert swapped_routers(model) == routers


def test_what_no_gate_of_the_family_is_is_refused(user_error):
    layer = "model.layers.0.mlp"
    refused(swapped_of("mixtral", "cosine"), user_error, layer, "CosineScorer")
    refused(swapped_of("mixtral", selector="topk"), user_error, layer, "TopK", "family's own rule")
    refused(swapped_of("mixtral", selector={"type": "balanced", "score": "softmax"}), user_error, layer, "Balanced")
    model = swapped_of("mixtral", {"type": "linear", "bias": True})
    with torch.no_grad():
        swapped_routers(model)["model.layers.1.mlp"].router.scorer.bias[2] = 0.1
    refused(model, user_error, "model.layers.1.mlp", "bias")
    with torch.no_grad():
        swapped_routers(model)["model.layers.1.mlp"].router.scorer.bias.zero_()
    fold_routers(model)


def test_mistakes_are_named(user_error):
    with user_error("no swapped router", "swap_routers"):
        fold_routers(stock_of("mixtral"))
    with user_error("no swapped router"):
        distill_to_gate(nn.Linear(2, 2), [])
    model = swapped_of("mixtral", "cosine")
    with user_error("no batches"):
        distill_to_gate(model, [])
    with user_error("batch", "list"):
        distill_to_gate(model, [[1, 2]])
    model = swapped_of("mixtral", {"type": "context", "width": 3}, init="fresh")
    with user_error("model.layers.0.mlp", "reads", "no gate"):
        distill_to_gate(model, [batch(model)])
    assert len(swapped_routers(model)) == 3


class Normed(nn.Module):
    """A gate that normalises its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = nn.functional.normalize(x, dim=-1) @ self.weight.T
        return logits, *logits.softmax(-1).topk(2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.layers = nn.ModuleList([nn.ModuleDict({"gate": Normed(), "experts": experts})])

    def forward(self, x: torch.Tensor) -> Any:
        return self.layers[0]["gate"](x)


def test_a_family_whose_gate_is_no_product_is_refused(user_error):
    model = Model()
    swap_routers(model, init="fresh")
    with user_error("layers.0", "Normed", "not those of one matrix"):
        fold_routers(model)
    with user_error("layers.0", "no linear gate"):
        distill_to_gate(model, [{"x": torch.randn(20, 8)}])
    assert len(swapped_routers(model)) == 1


def test_adapters_are_merged_first(user_error):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"], init_lora_weights=False)
    model = peft.get_peft_model(swapped_of("mixtral"), config).eval()
    for refused in (fold_routers, lambda model: distill_to_gate(model, [batch(model)])):
        with user_error("PEFT", "merge_and_unload"):
            refused(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.3 * torch.randn_like(parameter)
        inputs = batch(stock_of("mixtral"))
        before = model(**inputs).logits
        merged = model.merge_and_unload()
        fold_routers(merged)
        torch.testing.assert_close(merged(**inputs).logits, before, rtol=0, atol=1e-4)
    assert [type(module) for module in merged.modules()] == [type(module) for module in stock_of("mixtral").modules()]

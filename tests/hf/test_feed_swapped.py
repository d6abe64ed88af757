"""Choices that another engine recorded, replayed in swapped Hugging Face models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import batch, build
from torch import Tensor

from spectralmoe import attach, feed, record
from spectralmoe.hf import swap_routers
from spectralmoe.layers import moe_layers

pytest.importorskip("transformers")


def swapped(family: str, **changes: Any) -> Any:
    model = build(family, **changes)
    swap_routers(model)
    return model.train()


def routed_experts(model: Any, tokens: int) -> Tensor:
    """(N, layers, K) as vLLM returns it: K distinct experts for each token in each layer."""
    layers = [layer.router for layer in moe_layers(model).values()]
    k = 1 if model.config.model_type == "llama4_text" else 2
    drawn = [torch.rand(tokens, router.num_experts).topk(k).indices for router in layers]
    return torch.stack(drawn, 1).to(torch.int32)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "llama4"])
def test_the_choices_are_replayed_and_train_the_router(family):
    model = swapped(family)
    inputs = batch(model)
    routed = routed_experts(model, inputs["input_ids"].numel())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attach(optimizer, model)
    biases = {name: value.clone() for name, value in model.named_buffers() if name.endswith("selector.bias")}
    with feed(model, indices=dict(zip(moe_layers(model), routed.unbind(1), strict=True))), record(model) as tape:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    for item, wanted in zip(tape, routed.unbind(1), strict=True):
        assert torch.equal(item.routing.indices, wanted.long())
    for layer in moe_layers(model).values():
        assert layer.router.scorer.weight.grad.any()
    assert all(torch.equal(value, model.get_buffer(name)) for name, value in biases.items())


def test_padding_is_left_out_and_checkpoints_choose_alike():
    model = swapped("mixtral")
    inputs = batch(model)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :7] = 0
    routed = routed_experts(model, mask.numel()).masked_fill(mask.view(-1, 1, 1) == 0, -1)
    indices = dict(zip(moe_layers(model), routed.unbind(1), strict=True))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        with feed(model, indices=indices, mask=mask.bool()), record(model) as tape:
            model(**inputs, attention_mask=mask, labels=inputs["input_ids"]).loss.backward()
        assert [item.name for item in tape] == list(indices)
        assert all(torch.equal(item.routing.indices, indices[item.name].long()) for item in tape)
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_they_are_what_the_model_itself_chose():
    """Fed with its own choices a model stays as it is."""
    model = swapped("qwen3_moe").eval()
    inputs = batch(model)
    with torch.no_grad(), record(model) as tape:
        wanted = model(**inputs).logits
    indices = {item.name: item.routing.indices for item in tape}
    with torch.no_grad(), feed(model, indices=indices):
        torch.testing.assert_close(model(**inputs).logits, wanted)


def test_wrong_indices_are_named(user_error):
    model = swapped("mixtral")
    first = "model.layers.0.mlp"
    with user_error(first, "expert 8", "0 to 7"), feed(model, indices={first: torch.tensor([[0, 8]])}):
        pass
    with user_error("N=1", "N=48"), feed(model, indices={first: torch.tensor([[0, 1]])}):
        model(**batch(model))

"""Stock routers of Hugging Face models on a tape: the routing that ran, with gradient, and nothing else changed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from forked import output_of

pytest.importorskip("transformers")

from families import ELEVEN, FAMILIES, batch, build
from seeds import generator, shifted
from stock_model import StockLayer
from torch.nn import functional as F

from spectralmoe import Term, attach, feed, penalty, record
from spectralmoe.hf import swap_routers
from spectralmoe.hf.layers import find_layers
from spectralmoe.hf.watch import watch_transformers
from spectralmoe.regularizers import load_balance, router_z, spectral_norm

family = pytest.mark.parametrize("family", ELEVEN)
TERMS = {"balance": Term(load_balance, 0.1), "z": Term(router_z, 0.1), "norm": Term(spectral_norm, 0.1)}


def padded(model: Any) -> dict[str, torch.Tensor]:
    """A batch whose second row ends with 7 tokens of padding."""
    inputs = batch(model)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, -7:] = 0
    return inputs


@family
def test_the_routing_is_what_a_watch_sees_with_gradient(family, close):
    model = build(family).train()
    inputs = padded(model)
    torch.manual_seed(shifted(0))  # of a router's jitter
    with torch.no_grad():
        plain = model(**inputs).logits
    torch.manual_seed(shifted(0))
    with record(model) as tape, watch_transformers(model) as watch:
        logits = model(**inputs).logits
        calls = {call.layer.name: call for call in watch.drain()}
    assert torch.equal(logits, plain)
    assert [item.name for item in tape] == [layer.name for layer in find_layers(model)]
    for item in tape:
        call = calls[item.name].routing
        assert item.training
        assert item.routing.logits.requires_grad
        assert item.routing.weights.requires_grad
        assert torch.equal(item.routing.indices, call.indices)
        assert item.routing.shape == call.shape
        close(item.routing.logits, call.logits)
        close(item.routing.weights, call.weights)
        if call.mask is not None:
            assert torch.equal(item.routing.mask, call.mask)
            assert bool((item.routing.weights[~call.mask] == 0).all())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@family
def test_terms_give_every_router_parameter_a_gradient(family):
    model = build(family).train()
    with record(model, terms=TERMS) as tape:
        model(**padded(model))
    loss, values = penalty(tape, TERMS)
    assert values.keys() == TERMS.keys()
    loss.backward()
    for layer in find_layers(model):
        trained = [(name, p) for name, p in layer.router.named_parameters() if not name.endswith("correction_bias")]
        for name, parameter in trained:
            assert parameter.grad is not None, (layer.name, name)
            assert bool((parameter.grad != 0).any()), (layer.name, name)


def test_the_balance_loss_is_that_of_the_equation(close):
    model = FAMILIES["mixtral"]().train()
    inputs = padded(model)
    with record(model) as tape:
        logits = model(**inputs, output_router_logits=True).router_logits
    real = inputs["attention_mask"].flatten().bool()
    for item, scores in zip(tape, logits, strict=True):
        probs = scores[real].softmax(-1)
        shares = F.one_hot(probs.topk(2).indices, 8).float().mean((0, 1))
        value = 8 * (shares * probs.mean(0)).sum()
        close(load_balance(item), value)
        close(*(torch.autograd.grad(loss, item.matrix, retain_graph=True)[0] for loss in (load_balance(item), value)))


def test_scores_are_those_before_the_selection_bias(close):
    model = FAMILIES["deepseek_v3"]().train()
    with record(model) as tape:
        model(**batch(model))
    for item in tape:
        close(item.routing.scores, item.routing.logits.sigmoid())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "switch"])
def test_a_recomputation_leaves_nothing(family, close):
    losses, gradients = [], []
    for checkpointing in (False, True):
        model = build(family).train()
        inputs = padded(model)
        inputs["labels"] = inputs.get("decoder_input_ids", inputs["input_ids"])
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its new name is not in older versions
                model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(shifted(0))
        with record(model, terms=TERMS) as tape:
            loss = model(**inputs).loss
            loss = loss + penalty(tape, TERMS)[0]
            loss.backward()
        assert len(tape) == len(find_layers(model))
        losses.append(loss.detach())
        gradients.append([layer.live_matrix.grad for layer in find_layers(model)])
    close(losses[1], losses[0])
    for one, two in zip(*gradients, strict=True):
        close(one, two)


def test_what_the_router_read_is_kept(close):
    model = FAMILIES["gpt_oss"]()
    with record(model, keep="tokens") as tape:
        model(**batch(model))
    for item in tape:
        close(F.linear(item.tensor("tokens"), item.matrix, item.layer.layer.router.bias), item.routing.logits)


def test_half_precision_is_read_in_fp32():
    model = FAMILIES["olmoe"]().to(torch.bfloat16).train()
    with record(model) as tape:
        model(**batch(model))
    assert {item.routing.logits.dtype for item in tape} == {item.matrix.dtype for item in tape} == {torch.float32}
    penalty(tape, TERMS)[0].backward()
    assert model.model.layers[0].mlp.gate.weight.grad.dtype == torch.bfloat16


def test_what_needs_another_router_says_so(user_error):
    model = FAMILIES["mixtral"]()
    with user_error("hidden", "tokens"), record(model, keep="hidden"):
        pass
    with user_error("stock routers", "swap_routers"), feed(model):
        pass
    with user_error("stock routers", "swap_routers"):
        attach(torch.optim.SGD(model.parameters(), lr=0.1), model)
    model.model.layers[1].mlp.gate = model.model.layers[0].mlp.gate
    with user_error("share one router"), record(model):
        pass


def test_layers_that_were_swapped_are_recorded_beside_the_others(close):
    model = FAMILIES["mixtral"]().train()
    with record(model) as stock:
        model(**padded(model))
    swap_routers(model, layers="model.layers.[01].*")
    with record(model, terms=TERMS) as tape:
        model(**padded(model))
    assert [item.name for item in tape] == [item.name for item in stock]
    assert [item.router is None for item in tape] == [False, False, True]
    for one, two in zip(tape, stock, strict=True):
        close(one.routing.weights, two.routing.weights)
        close(one.routing.scores[one.routing.mask], two.routing.scores[two.routing.mask])
    penalty(tape, TERMS)[0].backward()
    assert all(bool((item.matrix.grad != 0).any()) for item in tape)


def test_two_models_are_apart():
    one, two = FAMILIES["mixtral"](), build("mixtral")
    with record(one) as tape, record(two) as other:
        one(**batch(one))
        two(**batch(two, rows=3))
    assert {len(item.routing.indices) for item in tape} == {48}
    assert {len(item.routing.indices) for item in other} == {72}


def test_inside_a_compiled_model(close):
    torch._dynamo.reset()
    model, x = StockLayer(), torch.randn(2, 5, 8, generator=generator(0))
    with record(model) as tape:
        model(x)
    fast = torch.compile(model, backend="eager")
    with record(fast) as compiled:
        fast(x)
    assert [item.name for item in tape] == [item.name for item in compiled]
    for one, two in zip(tape, compiled, strict=True):
        close(two.routing.logits, one.routing.logits)
        assert two.routing.logits.requires_grad


def test_a_model_of_this_library_loads_nothing_of_hugging_face():
    code = (
        "import sys; from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record\n"
        "import torch; layer = MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 16))\n"
        "with record(layer): layer(torch.ones(1, 8))\n"
        "assert not {'transformers', 'spectralmoe.hf'} & set(sys.modules)"
    )
    output_of(code)

"""The layer: the sum that it computes, shapes, masks, dispatch by name, errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectralmoe import FeedForward, Grouped, LinearScorer, Loop, MoE, Router, Soft, TopK


def layer_of(selector=None, *, experts=4, bank=4, **options):
    return MoE(Router(LinearScorer(8, experts), selector or TopK(2)), FeedForward(bank, 8, 12), **options)


def slow(layer, x):
    """y_t = sum_j w_tj E_{i_tj}(x_t) + S(x_t), one token at a time."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        shares = (layer.router.scorer.weight @ row).softmax(-1)
        chosen = sorted(range(len(shares)), key=lambda e: -shares[e].item())[
            : getattr(layer.router.selector, "k", None)
        ]
        outputs = [shares[e] * layer.experts.expert(row[None], e)[0] for e in chosen if e < layer.experts.num_experts]
        rows.append(sum(outputs, torch.zeros_like(row)) + (0 if layer.shared is None else layer.shared(row)))
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize(
    "dispatch",
    ["auto", "loop", "dense", "grouped", Loop(), Grouped()],
    ids=lambda d: d if isinstance(d, str) else type(d).__name__,
)
@pytest.mark.parametrize("k", [1, 2, None], ids=["top-1", "top-2", "soft"])
@pytest.mark.parametrize("shared", [False, True], ids=["routed", "shared"])
def test_definition(dispatch, k, shared, same):
    layer = layer_of(
        Soft() if k is None else TopK(k), dispatch=dispatch, shared=nn.Linear(8, 8) if shared else None
    ).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    same(layer(x), slow(layer, x), [x, *layer.parameters()])


def test_more_experts_in_the_router_are_zero_experts(same):
    layer = layer_of(experts=7).double()
    x = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    assert layer.router(x).counts()[4:].any()
    same(layer(x), slow(layer, x), [x, *layer.parameters()])


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 5, 8), (0, 8), (2, 0, 8)], ids=str)
def test_leading_dimensions_are_kept(shape):
    assert layer_of(shared=nn.Linear(8, 8))(torch.randn(shape)).shape == shape


def test_tokens_may_lie_anyhow_in_memory(close):
    layer, x = layer_of(shared=nn.Linear(8, 8)), torch.randn(8, 5, 3).permute(2, 1, 0)
    assert not x.is_contiguous()
    close(layer(x), layer(x.contiguous()))


def test_masked_tokens_get_no_expert_and_no_shared_one(close):
    layer = layer_of(shared=nn.Linear(8, 8))
    x, mask = torch.randn(2, 6, 8), torch.rand(2, 6) < 0.5
    y = layer(x, mask=mask)
    assert not y[~mask].any()
    close(y[mask], layer(x)[mask])


def test_a_callable_dispatch_is_used():
    def half(x, routing, experts):
        return x / 2

    x = torch.randn(5, 8)
    assert torch.equal(layer_of(dispatch=half)(x), x / 2)


def test_bf16_models_keep_their_router_and_give_bf16(close):
    layer, x = layer_of(), torch.randn(20, 8)
    expected = layer(x)
    y = layer.to(torch.bfloat16)(x.bfloat16())
    assert y.dtype == torch.bfloat16
    close(y, expected, torch.bfloat16)


def test_only_chosen_experts_get_a_gradient():
    layer = layer_of(TopK(1))
    x = torch.randn(1, 8)
    layer(x).sum().backward()
    chosen = int(layer.router(x).indices)
    assert [bool(g.any()) for g in layer.experts.up.grad] == [e == chosen for e in range(4)]


def test_mistakes_are_named(user_error):
    with user_error("dispatch", "'groupd'", "auto", "grouped"):
        layer_of(dispatch="groupd")
    with user_error("MoE", "E=3", "4"):
        layer_of(experts=3)
    with user_error("Router", "9", "D=8"):
        layer_of()(torch.randn(5, 9))


@pytest.mark.parametrize("dispatch", ["loop", "dense", "grouped"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_padding_is_inert_in_the_shared_expert_and_its_gradient(make_router, dispatch, poison, close):
    """Whatever the padding holds, and the gradient from above has there."""
    experts, shared = FeedForward(6, 12, 8), torch.nn.Linear(12, 12)
    layer = MoE(make_router("linear", "topk"), experts, dispatch=dispatch, shared=shared)
    x, mask = torch.randn(2, 20, 12), torch.arange(20).expand(2, -1) < 13
    scale = torch.tensor(0.7, requires_grad=True)
    found = []
    for tokens, own in ((x.masked_fill(~mask[..., None], poison), mask), (x[mask], None)):
        tokens.requires_grad_()
        y = layer(tokens, mask=own, scale=scale)
        slope = torch.ones_like(y) if own is None else torch.where(own[..., None], 1.0, torch.nan).expand_as(y)
        grads = torch.autograd.grad(y, [tokens, scale, *layer.parameters()], slope)
        if own is not None:
            assert not y[~own].any()
            assert not grads[0][~own].any()
        found.append([y if own is None else y[own], grads[0] if own is None else grads[0][own], *grads[1:]])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)

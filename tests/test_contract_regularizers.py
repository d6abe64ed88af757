"""What every regularizer keeps: a new table entry is held to it without a line here.

One that needs tensors of the forward says so by ``keeps``; without it, its gradient must reach the router. One that
gets the records of all layers (``of_model``) is held to it in two layers.
"""

from __future__ import annotations

import math

import pytest
import torch
from small_parts import make_regularizer
from torch import nn
from torch.utils.checkpoint import checkpoint

from spectralmoe import FeedForward, LinearScorer, MoE, Router, Term, TopK, penalty, record

D, E = 12, 6


@pytest.fixture
def term(regularizer_name):
    return make_regularizer(regularizer_name)


class Two(nn.Module):
    """Two layers on the same tokens."""

    def __init__(self, one, two):
        super().__init__()
        self.one, self.two = one, two

    def forward(self, x, mask=None):
        return self.two(self.one(x, mask=mask), mask=mask)


@pytest.fixture
def layer(term):
    layers = [MoE(Router(LinearScorer(D, E), TopK(2)), FeedForward(E, D, 8)) for _ in range(2)]
    return Two(*layers) if Term(term, 1.0).scope == "model" else layers[0]


def routers_of(layer):
    return [module for module in layer.modules() if isinstance(module, Router)]


def value_of(term, layer, x, mask=None):
    """The value of the term for one forward of the layer."""
    with record(layer, terms={"it": Term(term, 1.0)}) as tape:
        layer(x, mask=mask)
    return of_tape(term, tape)


def of_tape(term, tape):
    """The value of the term for what was recorded."""
    ((_, value),) = Term(term, 1.0).values(tape.records)
    return value


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n", [0, 1, 50])
def test_it_is_a_finite_fp32_scalar_of_any_number_of_tokens(term, layer, n, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = value_of(term, layer, torch.randn(n, D))
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value.isfinite()


def test_autocast_takes_nothing_from_its_precision(term, layer, close):
    with record(layer, terms={"it": Term(term, 1.0)}) as tape:
        layer(torch.randn(40, D))
    with torch.autocast("cpu", torch.bfloat16):
        value = of_tape(term, tape)
    close(value, of_tape(term, tape))


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e4], ids=str)
@pytest.mark.parametrize("of", ["tokens", "router"])
def test_extreme_input_gives_a_finite_value_and_gradient(term, layer, gradients, of, scale):
    x = torch.randn(40, D)
    if of == "tokens":
        x = scale * x
    else:
        for router in routers_of(layer):
            router.scorer.weight.data *= scale
    value = value_of(term, layer, x)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in gradients(value, layer.parameters()))


def test_its_gradient_reaches_the_router_or_what_it_keeps(term, layer, gradients):
    for router in routers_of(layer):
        router.scorer.weight.data *= 3 / router.scorer.weight.norm()  # sigma_1 above 1: no hinge is idle
        router.scorer.weight.data += 1
    reached = layer.parameters() if Term(term, 1.0).keeps else [p for r in routers_of(layer) for p in r.parameters()]
    assert any(g.any() for g in gradients(value_of(term, layer, torch.randn(40, D)), reached))


def test_masked_tokens_are_inert(term, layer, gradients, close):
    x, mask = torch.randn(40, D), torch.rand(40) < 0.6
    mask[0], mask[1] = True, False
    broken = x.masked_fill(~mask[:, None], math.nan)
    alone, masked = value_of(term, layer, x[mask]), value_of(term, layer, broken, mask)
    close(masked, alone)
    for one, two in zip(*(gradients(value, layer.parameters()) for value in (masked, alone)), strict=True):
        close(one, two)


def test_nothing_but_masked_tokens_is_finite(term, layer, gradients):
    value = value_of(term, layer, torch.randn(9, D), torch.zeros(9, dtype=torch.bool))
    assert value.isfinite()
    assert all(g.isfinite().all() for g in gradients(value, layer.parameters()))


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.full)])
def test_it_is_the_same_of_a_compiled_layer(backend, term, layer, gradients, close):
    torch.compiler.reset()
    x, values = torch.randn(40, D), []
    for forward in (layer, torch.compile(layer, backend=backend)):
        with record(layer, terms={"it": Term(term, 1.0)}) as tape:
            forward(x)
        values.append(of_tape(term, tape))
    close(*values)
    for one, two in zip(*(gradients(value, layer.parameters()) for value in values), strict=True):
        close(one, two)


def test_it_is_the_same_under_activation_checkpointing(term, layer, gradients, close):
    x, found = torch.randn(40, D), []
    for again in (False, True):
        with record(layer, terms={"it": Term(term, 1.0)}) as tape:
            y = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        value = of_tape(term, tape)
        found.append((value, gradients(value + y.square().mean(), layer.parameters())))
    close(found[0][0], found[1][0])
    for one, two in zip(found[0][1], found[1][1], strict=True):
        close(one, two)


def test_a_term_weighs_it(term, layer, regularizer_name, close):
    terms = {regularizer_name: Term(term, 0.5)}
    with record(layer, terms=terms) as tape:
        layer(torch.randn(40, D))
    total, parts = penalty(tape, terms)
    close(total, 0.5 * of_tape(term, tape))
    close(parts[regularizer_name], of_tape(term, tape).detach())

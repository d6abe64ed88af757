"""What every regularizer keeps: a new table entry is held to it without a line here.

One that needs tensors of the forward says so by ``keeps``; without it, its gradient must reach the router.
"""

from __future__ import annotations

import math

import pytest
import torch
from small_parts import make_regularizer

from spectralmoe import FeedForward, LinearScorer, MoE, Router, Term, TopK, penalty, record

D, E = 12, 6


@pytest.fixture
def term(regularizer_name):
    return make_regularizer(regularizer_name)


@pytest.fixture
def layer():
    return MoE(Router(LinearScorer(D, E), TopK(2)), FeedForward(E, D, 8))


def value_of(term, layer, x, mask=None):
    """The value of the term for one forward of the layer."""
    with record(layer, keep=Term(term, 1.0).keeps) as tape:
        layer(x, mask=mask)
    return term(tape[0])


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n", [0, 1, 50])
def test_it_is_a_finite_fp32_scalar_of_any_number_of_tokens(term, layer, n, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = value_of(term, layer, torch.randn(n, D))
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value.isfinite()


def test_autocast_takes_nothing_from_its_precision(term, layer, close):
    with record(layer, keep=Term(term, 1.0).keeps) as tape:
        layer(torch.randn(40, D))
    with torch.autocast("cpu", torch.bfloat16):
        value = term(tape[0])
    close(value, term(tape[0]))


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e4], ids=str)
@pytest.mark.parametrize("of", ["tokens", "router"])
def test_extreme_input_gives_a_finite_value_and_gradient(term, layer, gradients, of, scale):
    x = torch.randn(40, D)
    if of == "tokens":
        x = scale * x
    else:
        layer.router.scorer.weight.data *= scale
    value = value_of(term, layer, x)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in gradients(value, layer.parameters()))


def test_its_gradient_reaches_the_router_or_what_it_keeps(term, layer, gradients):
    layer.router.scorer.weight.data *= 3 / layer.router.scorer.weight.norm()  # sigma_1 above 1: no hinge is idle
    layer.router.scorer.weight.data += 1
    reached = layer.parameters() if Term(term, 1.0).keeps else layer.router.parameters()
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


def test_it_is_the_same_of_a_compiled_layer(term, layer, gradients, close):
    torch.compiler.reset()
    x, values = torch.randn(40, D), []
    for forward in (layer, torch.compile(layer, backend="aot_eager")):
        with record(layer, keep=Term(term, 1.0).keeps) as tape:
            forward(x)
        values.append(term(tape[0]))
    close(*values)
    for one, two in zip(*(gradients(value, layer.parameters()) for value in values), strict=True):
        close(one, two)


def test_a_term_weighs_it(term, layer, regularizer_name, close):
    with record(layer, keep=Term(term, 1.0).keeps) as tape:
        layer(torch.randn(40, D))
    total, parts = penalty(tape, {regularizer_name: Term(term, 0.5)})
    close(total, 0.5 * term(tape[0]))
    close(parts[regularizer_name], term(tape[0]).detach())

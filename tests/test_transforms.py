"""Forward-mode derivatives, ``torch.func`` and gradients of gradients: the values of the definition."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from spectralmoe import FeedForward, LinearScorer, ModuleExperts, MoE, Router, TopK, record
from spectralmoe.dispatch import DISPATCHES
from spectralmoe.experts.grouped_gemm import grouped_linear
from spectralmoe.linalg import sigma_max, stable_rank
from spectralmoe.regularizers import spectral_norm

dispatches = pytest.mark.parametrize("dispatch", ["auto", *DISPATCHES])


@pytest.fixture
def layer(make_router):
    return MoE(
        make_router("linear", "topk", 4, 3), FeedForward(3, 4, 5, bias=True), shared=torch.nn.Linear(4, 4)
    ).double()


def tangent(f, x, v):
    """The derivative of f at x along v, by reverse mode twice."""
    x = x.clone().requires_grad_()
    y = f(x)
    u = torch.ones_like(y, requires_grad=True)
    (pulled,) = torch.autograd.grad(y, x, u, create_graph=True)
    return torch.autograd.grad(pulled, u, v)[0]


@dispatches
def test_forward_mode(layer, dispatch, close):
    layer.dispatch = dispatch
    x, v = torch.randn(2, 5, 4, dtype=torch.float64)
    expected = tangent(layer, x, v)
    assert expected.abs().max() > 0.1
    close(torch.func.jvp(layer, (x,), (v,))[1], expected)
    with forward_ad.dual_level():
        close(forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v))).tangent, expected)
    jacobian = torch.func.jacfwd(layer)(x)
    close((jacobian * v).sum((-1, -2)), expected)


@dispatches
@pytest.mark.parametrize("tokens", [1, 5])
def test_gradients_of_each_sample(layer, dispatch, tokens, close):
    layer.dispatch = dispatch
    batch, parameters = torch.randn(3, tokens, 4, dtype=torch.float64), dict(layer.named_parameters())

    def loss(values, x):
        return torch.func.functional_call(layer, values, (x,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, batch)
    for i, x in enumerate(batch):
        expected = torch.autograd.grad(loss(parameters, x), list(parameters.values()), allow_unused=True)
        for one, two in zip(found.values(), expected, strict=True):
            close(one[i], torch.zeros_like(one[i]) if two is None else two)


def test_every_scorer_and_selector(make_router, scorer_name, selector_name, close):
    layer = MoE(make_router(scorer_name, selector_name, 6, 4), FeedForward(4, 6, 3), dispatch="grouped").double().eval()
    x, v = torch.randn(2, 5, 6, dtype=torch.float64)
    close(torch.func.jvp(layer, (x,), (v,))[1], tangent(layer, x, v))
    start = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(layer(start).square().sum(), start)
    close(torch.func.grad(lambda tokens: layer(tokens).square().sum())(x), expected)
    close(torch.func.vmap(layer)(torch.stack([x, v])), torch.stack([layer(x), layer(v)]))


@dispatches
def test_hessian(layer, dispatch, close):
    layer.dispatch = dispatch
    x, v = torch.randn(2, 3, 4, dtype=torch.float64)

    def loss(tokens):
        return layer(tokens).square().sum()

    start = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(start), start, create_graph=True)
    (product,) = torch.autograd.grad(gradient, start, v)
    close((torch.func.hessian(loss)(x) * v).sum((-1, -2)), product)
    assert torch.autograd.gradgradcheck(layer, (x.requires_grad_(),))


def test_third_derivatives_of_the_fused_operator(layer, close):
    x, v = torch.randn(2, 3, 4, dtype=torch.float64)
    thirds = []
    for dispatch in ("loop", "grouped"):
        layer.dispatch, start = dispatch, x.clone().requires_grad_()
        value = layer(start).pow(3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, start, create_graph=True)
            value = (gradient * v).sum()
        thirds.append(value.detach())
    close(*thirds)
    assert thirds[0].abs() > 1e-3


@pytest.mark.parametrize("width", [4, 3])
def test_a_bank_called_alone(width, close):
    x, weight = torch.randn(5, width), torch.randn(2, 8, width)
    v, counts = torch.randn(5, width), torch.tensor([3, 2])
    value, slope = torch.func.jvp(lambda rows: grouped_linear(rows, weight, counts), (x,), (v,))
    close(value, grouped_linear(x, weight, counts))
    close(slope, grouped_linear(v, weight, counts))


def test_module_experts(close):
    bank = ModuleExperts([torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()) for _ in range(3)])
    layer = MoE(Router(LinearScorer(4, 3), TopK(2)), bank).double()
    x, v = torch.randn(2, 5, 4, dtype=torch.float64)
    close(torch.func.jvp(layer, (x,), (v,))[1], tangent(layer, x, v))
    close(torch.func.vmap(layer)(torch.stack([x, v])), torch.stack([layer(x), layer(v)]))


def test_spectral_term(layer, close):
    x, weight = torch.randn(5, 4, dtype=torch.float64), layer.router.scorer.weight

    def term(matrix):
        with record(layer) as tape:
            torch.func.functional_call(layer, {"router.scorer.weight": matrix}, (x,))
        return spectral_norm(tape[0], matrix="gates", form="square")

    (expected,) = torch.autograd.grad(term(weight), weight)
    close(torch.func.grad(term)(weight.detach()), expected)


def test_kept_tensors_are_refused(layer, user_error):
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    with record(layer, keep=("hidden",)), user_error("keep", "torch.func"):
        torch.func.vmap(layer)(x)


def test_transforms_inside_a_compiled_function(make_router, close):
    layer = MoE(make_router("prototype", "topk", 4, 3), FeedForward(3, 4, 5)).double().eval()
    x, v = torch.randn(2, 5, 4, dtype=torch.float64)

    def slope(tokens, direction):
        return torch.func.jvp(layer, (tokens,), (direction,))[1]

    close(torch.compile(slope, backend="aot_eager")(x, v), tangent(layer, x, v))


def test_a_compiled_graph_without_transforms_holds_nothing_of_them(make_router):
    layer = MoE(make_router("linear", "topk", 4, 3), FeedForward(3, 4, 5)).eval()
    graphs = torch._dynamo.explain(layer)(torch.randn(5, 4)).graphs
    assert len(graphs) == 1
    assert not any("functorch" in str(node.target) for node in graphs[0].graph.nodes)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_second_derivatives_of_spectra(shape, close):
    """Against the singular values themselves, by reverse mode over reverse mode."""
    matrix = torch.randn(shape, dtype=torch.float64)

    def plain(m):
        values = torch.linalg.svdvals(m)
        return values[0] + values.square().sum() / values[0] ** 2

    def ours(m):
        return sigma_max(m) + stable_rank(m)

    close(torch.func.hessian(ours)(matrix), torch.autograd.functional.hessian(plain, matrix))
    close(torch.func.grad(ours)(matrix), torch.autograd.functional.jacobian(plain, matrix))
    assert torch.func.grad(sigma_max)(torch.zeros(shape)).eq(0).all()
    assert torch.func.vmap(sigma_max)(torch.full((2, *shape), torch.nan)).isnan().all()

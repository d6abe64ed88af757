"""Geometry against numpy, and Jacobians against autograd, one token at a time."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectralmoe import (
    Balanced,
    CosineScorer,
    EigenbasisScorer,
    FeedForward,
    LinearScorer,
    MoE,
    PrototypeScorer,
    Router,
    TopK,
)
from spectralmoe.diagnostics import (
    Watched,
    effective_rank,
    jacobian_norm,
    row_cosine,
    row_cosines,
    row_spread,
    sigma_1,
    spectrum,
    stable_rank,
    watch,
)

D, E = 6, 4
MEASURES = (sigma_1, stable_rank, effective_rank, row_cosine)


@st.composite
def matrices(draw):
    shape, seed = (draw(st.integers(2, 7)), draw(st.integers(1, 7))), draw(st.integers(0, 10**6))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(matrix=matrices())
def test_definitions(matrix):
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    shares = values / values.sum()
    assert spectrum(matrix).tolist() == pytest.approx(values.tolist(), rel=1e-9, abs=1e-12)
    assert sigma_1(matrix).value == pytest.approx(values[0], rel=1e-9)
    assert stable_rank(matrix).value == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-9)
    assert effective_rank(matrix).value == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
    rows = [row / np.linalg.norm(row) for row in matrix.numpy()]
    pairs = [abs(float(a @ b)) for i, a in enumerate(rows) for b in rows[:i]]
    assert row_cosine(matrix).value == pytest.approx(sum(pairs) / len(pairs), rel=1e-9)
    assert row_cosines(matrix).numpy() == pytest.approx(np.array([[a @ b for b in rows] for a in rows]), abs=1e-12)
    assert all(measure(matrix).data == matrix.numel() for measure in MEASURES)
    assert all(measure(matrix).unit == "weights" for measure in MEASURES)


@given(matrix=matrices(), scale=st.floats(1e-3, 1e3), data=st.data())
def test_order_scale_and_bounds(matrix, scale, data):
    order = data.draw(st.permutations(range(len(matrix))))
    for measure in MEASURES:
        value, grows = measure(matrix).value, scale if measure is sigma_1 else 1
        assert measure(matrix[order]).value == pytest.approx(value, rel=1e-9)
        assert measure(-scale * matrix).value == pytest.approx(grows * value, rel=1e-9)
    rank = min(matrix.shape)
    assert 1 - 1e-9 <= stable_rank(matrix).value <= rank + 1e-9
    assert 1 - 1e-9 <= effective_rank(matrix).value <= rank + 1e-9
    assert 0 <= row_cosine(matrix).value <= 1 + 1e-12


def test_ends():
    apart, line = torch.eye(5, 8), torch.ones(5, 8)
    line[1] *= -3
    assert [measure(apart).value for measure in MEASURES] == pytest.approx([1, 5, 5, 0])
    assert [measure(line).value for measure in MEASURES[1:]] == pytest.approx([1, 1, 1])
    assert [measure(torch.zeros(5, 8)).value for measure in MEASURES] == [0, 0, 0, 0]


def test_no_geometry():
    broken = torch.randn(3, 4)
    broken[1, 2] = math.nan
    for matrix in (broken, torch.full((3, 4), math.inf), torch.empty(0, 4), torch.empty(3, 0)):
        assert all(measure(matrix).value is None for measure in MEASURES)
    assert spectrum(broken).isnan().tolist() == [True] * 3
    assert row_cosine(torch.randn(1, 4)).value is None
    assert row_cosines(broken)[1].isnan().all()


class Live(Watched):
    """A router that lets gradients through."""

    name, number = "live", 0

    def __init__(self, router, cut=False):
        self.router, self.cut, self.num_experts, self.top_k = router, cut, router.num_experts, 2

    @property
    def matrix(self):
        return self.router.scorer.matrix

    def route(self, x, dtype=None):
        return self.router(x.detach() if self.cut else x)

    def expert(self, x, e):
        raise NotImplementedError

    expert_weights = expert


def slow_norm(router, x):
    norms = []
    for token in x.double():
        jacobian = torch.autograd.functional.jacobian(lambda t: router(t[None]).probs[0], token)
        norms.append(float(torch.linalg.matrix_norm(jacobian, 2)))
    return sum(norms) / len(norms)


def own(router):
    model = MoE(router, FeedForward(router.num_experts, D, 5))
    with watch(model) as seen:
        return seen.layers[0]


def biased():
    scorer = LinearScorer(D, E, bias=True)
    torch.nn.init.normal_(scorer.bias)
    return scorer


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "make", [biased, lambda: PrototypeScorer(D, E), lambda: CosineScorer(D, E), lambda: EigenbasisScorer(D, E, rank=3)]
)
def test_jacobian_by_gradient(make, score):
    router, x = Router(make(), TopK(2, score=score)), torch.randn(37, D)
    found = jacobian_norm(Live(router), x)
    assert found.data == 37
    assert found.value == pytest.approx(slow_norm(router, x), rel=1e-5)
    assert all(p.grad is None for p in router.parameters())


@pytest.mark.parametrize("layer", [own, lambda router: Live(router, cut=True)])
@pytest.mark.parametrize(
    "selector", [TopK(2), TopK(2, score="sigmoid"), Balanced(2)], ids=["softmax", "sigmoid", "bal"]
)
@pytest.mark.parametrize("size", [1e-3, 1, 10])
@pytest.mark.parametrize("tokens", [1, 37])
def test_jacobian_without_gradient(layer, selector, size, tokens):
    router, x = Router(biased(), copy.deepcopy(selector)), 3 * torch.randn(tokens, D)
    router.scorer.weight.data *= size  # tiny logits look alike under softmax and sigmoid, but their slopes do not
    router.scorer.bias.data *= size
    assert jacobian_norm(layer(router), x).value == pytest.approx(slow_norm(router, x), rel=1e-4)


class Common(LinearScorer):
    """Adds to all logits what a softmax does not see, but a sigmoid does."""

    def forward(self, x, *, context=None):
        return super().forward(x) + x.norm(dim=-1, keepdim=True)


class Squared(TopK):
    def scored(self, logits):
        return logits.square()


def test_a_shift_common_to_all_experts_does_not_matter_to_a_softmax():
    router, x = Router(Common(D, E), TopK(2)), torch.randn(9, D)
    assert jacobian_norm(own(router), x).value == pytest.approx(slow_norm(router, x), rel=1e-4)


@pytest.mark.parametrize(
    "router",
    [
        Router(PrototypeScorer(D, E), TopK(2)),  # affine in x, but its matrix is not the slope
        Router(CosineScorer(D, E), TopK(2)),
        Router(Common(D, E), TopK(2, score="sigmoid")),
        Router(LinearScorer(D, E), Squared(2)),
    ],
)
def test_what_a_matrix_does_not_tell_is_not_made_up(router):
    for x in (torch.randn(9, D), torch.zeros(9, D)):
        assert jacobian_norm(Live(router, cut=True), x).value is None


def test_jacobian_of_an_even_and_of_a_frozen_router():
    router = Router(LinearScorer(D, 2), TopK(1))
    router.scorer.weight.data = torch.tensor([[3.0], [-1.0]]) * torch.eye(D)[:1]
    at_the_edge = torch.zeros(5, D)  # p = 1/2: the slope of a sigmoid of 4 x_1, in both experts
    assert jacobian_norm(own(router), at_the_edge).value == pytest.approx(math.sqrt(2) * 4 / 4, rel=1e-6)
    assert jacobian_norm(own(router), 1e3 * torch.eye(D)[:1]).value == pytest.approx(0, abs=1e-12)
    torch.nn.init.zeros_(router.scorer.weight)
    assert jacobian_norm(own(router), torch.randn(5, D)).value == 0


def test_jacobian_in_half_precision_in_inference_mode_and_without_tokens():
    router, x = Router(biased(), TopK(2)), torch.randn(20, D)
    for layer in (own(router), Live(router)):
        want = jacobian_norm(layer, x.bfloat16().float())
        assert jacobian_norm(layer, x.bfloat16()) == want
        with torch.inference_mode():
            assert jacobian_norm(layer, x.bfloat16().float()).value == pytest.approx(want.value, rel=1e-5)
        for empty in (x[:0], torch.empty(0)):
            assert jacobian_norm(layer, empty).value is None
        assert jacobian_norm(layer, torch.full((2, D), math.nan)).value is None


def test_row_spread_by_definition():
    matrix = torch.randn(5, 7, dtype=torch.float64)
    rows = matrix.tolist()
    mean = [sum(column) / 5 for column in zip(*rows, strict=True)]
    apart = sum((value - middle) ** 2 for row in rows for value, middle in zip(row, mean, strict=True))
    whole = sum(value**2 for row in rows for value in row)
    assert row_spread(matrix).value == pytest.approx((apart / whole) ** 0.5, rel=1e-9)
    for nothing in (torch.zeros(4, 6), torch.ones(4, 6), torch.empty(4, 0)):
        assert row_spread(nothing).value == 0
    for unknown in (torch.randn(1, 6), torch.empty(0, 0), torch.full((4, 6), math.nan)):
        assert row_spread(unknown).value is None

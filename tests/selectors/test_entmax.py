"""Entmax against its definition, solved by bisection in float64, and against the Jacobian of the paper."""

from __future__ import annotations

import pytest
import torch

from spectralmoe import FeedForward, LinearScorer, MoE, Router, Soft
from spectralmoe.selectors import Entmax
from spectralmoe.selectors.entmax import entmax

ALPHAS = (1.01, 1.25, 1.5, 1.9, 2.0)


def slow(row, alpha):
    """p_e = [(alpha - 1) s_e - tau]_+ ** (1 / (alpha - 1)), tau halved in until the sum is 1."""
    z = [(alpha - 1) * s for s in row]
    low, high = max(z) - 1, max(z)
    for _ in range(100):
        tau = (low + high) / 2
        p = [max(value - tau, 0.0) ** (1 / (alpha - 1)) for value in z]
        low, high = (tau, high) if sum(p) >= 1 else (low, tau)
    return p


def slow_rows(logits, alpha):
    return torch.tensor([slow(row, alpha) for row in logits.tolist()], dtype=torch.float64)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_weights_are_those_of_the_definition(alpha, close):
    for scale in (0.0, 0.1, 1.0, 30.0):
        logits = scale * torch.randn(4, 24, dtype=torch.float64)
        found = entmax(logits, alpha)
        close(found, slow_rows(logits, alpha))
        close(found.sum(-1), torch.ones(4, dtype=torch.float64))
        close(entmax(logits.float(), alpha), found, torch.float32)
    many = torch.randn(5, 256, dtype=torch.float64)
    close(entmax(many, alpha), slow_rows(many, alpha))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_gradient_is_exact(alpha, close):
    """diag(r) - r r' / sum r with r = p^(2 - alpha) on the support; and forward mode agrees with it."""
    logits = torch.randn(6, dtype=torch.float64)
    p = entmax(logits, alpha)
    r = torch.where(p > 0, p ** (2 - alpha), 0)
    expected = r.diag() - torch.outer(r, r) / r.sum()
    close(torch.autograd.functional.jacobian(lambda s: entmax(s, alpha), logits), expected)
    close(torch.func.jacfwd(lambda s: entmax(s, alpha))(logits), expected)
    assert torch.autograd.gradcheck(lambda s: entmax(s, alpha), (logits.requires_grad_(),))


def test_by_hand():
    """alpha 1.5 of (2, 0): both in, sqrt p = s/2 - tau, so (1 - tau)^2 + tau^2 = 1 has tau = 0."""
    assert entmax(torch.tensor([2.0, 0.0])).tolist() == pytest.approx([1.0, 0.0])
    assert entmax(torch.tensor([1.0, 0.0]), 2.0).tolist() == pytest.approx([1.0, 0.0])
    assert entmax(torch.tensor([0.4, 0.0]), 2.0).tolist() == pytest.approx([0.7, 0.3])
    assert entmax(torch.zeros(3, 4)).flatten().tolist() == pytest.approx([0.25] * 12)


def test_it_is_sparse_softmax_at_1_and_moved_by_no_shift(close):
    logits = 3 * torch.randn(50, 16)
    for alpha in (1.5, 2.0):
        assert 0.2 < float((entmax(logits, alpha) == 0).float().mean()) < 1
    assert torch.equal(entmax(logits, 1.0), logits.softmax(-1))
    close(entmax(logits + 7, 1.5), entmax(logits, 1.5))
    assert entmax(torch.zeros(0, 5)).shape == (0, 5)
    assert entmax(torch.tensor([[1e4, -1e4], [-torch.inf, 0.0]])).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_in_a_layer_it_weighs_all_experts_and_no_gradient_reaches_those_at_zero(close):
    layer = MoE(Router(LinearScorer(8, 6), Entmax()), FeedForward(6, 8, 5))
    layer.router.scorer.weight.data *= 10
    x = torch.randn(9, 8)
    routing = layer.router(x)
    assert routing.soft
    assert routing.indices.tolist() == [list(range(6))] * 9
    close(layer(x), sum(routing.weights[:, e : e + 1] * layer.experts.expert(x, e) for e in range(6)))
    unused = (routing.weights == 0).nonzero()
    assert len(unused)
    row, e = unused[0].tolist()
    (layer(x[row : row + 1]) ** 2).sum().backward()
    assert not layer.experts.up.grad[e].any()
    assert not layer.router.scorer.weight.grad[e].any()
    alike = Router(layer.router.scorer, Entmax(1.0))(x)
    assert torch.equal(alike.weights, Router(layer.router.scorer, Soft())(x).weights)


def test_behind_a_norm_the_scale_of_logits_says_nothing(close):
    selector, logits = Entmax(1.5, norm=True), torch.randn(7, 8, dtype=torch.float64)
    centred = logits - logits.mean(-1, keepdim=True)
    expected = slow_rows(centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt(), 1.5)
    close(selector.weigh(logits, selector.choose(logits)), expected)
    torch.testing.assert_close(selector.scores(100 * logits + 3), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("alpha", [0.5, 1.001, 2.5, float("nan")])
def test_other_exponents_are_refused(alpha, user_error):
    with user_error("Entmax", "alpha", "1.01 and 2", str(alpha)):
        Entmax(alpha)

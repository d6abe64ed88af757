"""Prototype gate: s_i = -|c x - mu_i|^2 / tau, a linear gate in disguise (core.md 9.3, items 1 and 3)."""

from __future__ import annotations

import pytest
import torch

from spectralmoe import LinearScorer, PrototypeScorer
from spectralmoe.linalg import sigma_max


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_equation(temperature, scale, same):
    scorer = PrototypeScorer(4, 3, temperature=temperature, scale=scale).double()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    rows = []
    for token in x:
        distances = [sum((scale * token[d] - mu[d]) ** 2 for d in range(4)) for mu in scorer.prototypes]
        rows.append(torch.stack([-d / temperature for d in distances]))
    slow = torch.stack(rows)
    same(scorer(x), slow, [x, *scorer.parameters()])


def test_by_hand(close):
    scorer = PrototypeScorer(2, 2, temperature=2.0)
    scorer.prototypes.data = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    close(scorer(torch.tensor([[1.0, 1.0]])), torch.tensor([[-0.5, -2.5]]))
    scorer.scale = 3.0
    close(scorer(torch.tensor([[1.0, 1.0]])), torch.tensor([[-6.5, -12.5]]))


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_it_is_the_linear_gate_with_a_tied_bias(scale, close):
    prototype = PrototypeScorer(12, 6, temperature=0.7, scale=scale).double()
    mu, tau = prototype.prototypes.detach(), 0.7
    linear = LinearScorer(12, 6, bias=True).double()
    linear.weight.data, linear.bias.data = 2 * scale * mu / tau, -mu.square().sum(1) / tau
    x = 3 * torch.randn(50, 12, dtype=torch.float64)
    close(prototype(x).softmax(-1), linear(x).softmax(-1))
    for one, two in zip(prototype.affine(), (linear.weight, linear.bias), strict=True):
        close(one, two)


@pytest.mark.parametrize("scale", [1.0, 0.3, 4.0])
def test_routing_is_as_smooth_as_the_largest_singular_value(scale, close):
    scorer = PrototypeScorer(12, 6, temperature=0.7, scale=scale).double()
    mu = scorer.prototypes.detach()
    sigma = scale * float(sigma_max(mu))
    centred = torch.linalg.svdvals(mu - mu.mean(0))[0]
    assert scorer.lipschitz() == pytest.approx(2 * scale * float(centred) / 0.7, rel=1e-6)
    assert scorer.lipschitz() / 2 <= sigma / 0.7  # the centred bound is the sharper one
    x, step = torch.randn(2, 200, 12, dtype=torch.float64)
    moved = (scorer(x + 0.1 * step).softmax(-1) - scorer(x).softmax(-1)).norm(dim=1)
    assert (moved <= sigma / 0.7 * 0.1 * step.norm(dim=1)).all()


def test_a_token_belongs_to_the_nearest_prototype():
    scorer = PrototypeScorer(12, 6)
    x = torch.randn(100, 12)
    nearest = torch.stack([(t - scorer.prototypes).norm(dim=1).argmin() for t in x])
    assert torch.equal(scorer(x).argmax(-1), nearest)


def test_scale_is_checked(user_error):
    for value in (0.0, -1.0, float("inf"), float("nan")):
        with user_error("PrototypeScorer", "scale", str(value)):
            PrototypeScorer(4, 3, scale=value)


def test_prototypes_start_at_norm_one():
    assert float(PrototypeScorer(256, 64).prototypes.detach().norm(dim=1).mean()) == pytest.approx(1, abs=0.05)

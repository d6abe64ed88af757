"""Expert choice: each expert takes its ceil(N c / E) best tokens."""

from __future__ import annotations

import math

import pytest
import torch

from spectralmoe import ExpertChoice


def slow(logits, capacity, mask=None):
    """One expert at a time, in float64: rows of [expert or -1]."""
    n, experts = logits.shape
    real = [t for t in range(n) if mask is None or mask[t]]
    scores = [[math.exp(v) / sum(math.exp(u) for u in row) for v in row] for row in logits.tolist()]
    indices = [[-1] * experts for _ in range(n)]
    for e in range(experts):
        for t in sorted(real, key=lambda t: -scores[t][e])[: math.ceil(len(real) * capacity / experts)]:
            indices[t][e] = e
    return indices


@pytest.mark.parametrize("capacity", [0.1, 1.0, 1.7, 9.0])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_equation(capacity, masked):
    logits = torch.randn(30, 5, dtype=torch.float64)
    mask = torch.rand(30) < 0.5 if masked else None
    assert ExpertChoice(capacity).choose(logits, mask=mask).tolist() == slow(logits, capacity, mask)


def test_weights_are_the_softmax_over_experts(same):
    logits = torch.randn(30, 5, dtype=torch.float64, requires_grad=True)
    selector = ExpertChoice(2.0)
    indices = selector.choose(logits.detach())
    expected = logits.exp() / logits.exp().sum(-1, keepdim=True) * (indices >= 0)
    same(selector.weigh(logits, indices), expected, [logits])


def test_by_hand():
    logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert ExpertChoice(1.0).choose(logits).tolist() == [[0, -1], [0, -1], [-1, 1], [-1, 1]]


@pytest.mark.parametrize("experts", [3, 7, 10])
@pytest.mark.parametrize(("capacity", "tenths"), [(1.0, 10), (1.1, 11), (0.7, 7)])
def test_an_exact_quotient_is_not_rounded_up(experts, capacity, tenths):
    for tens in range(1, 20):
        logits = torch.randn(10 * tens * experts, experts)
        taken = (ExpertChoice(capacity).choose(logits) >= 0).sum(0)
        assert taken.tolist() == [tenths * tens] * experts


def test_ties_go_to_earlier_tokens():
    assert ExpertChoice(1.0).choose(torch.zeros(4, 2)).tolist() == [[0, 1], [0, 1], [-1, -1], [-1, -1]]


@pytest.mark.parametrize("capacity", [0, -1.0])
def test_a_capacity_must_be_positive(user_error, capacity):
    with user_error("ExpertChoice", "capacity", str(capacity)):
        ExpertChoice(capacity)

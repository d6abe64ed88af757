"""Threshold: of the k best experts those that score at least theta."""

from __future__ import annotations

import math

import pytest
import torch

from spectralmoe import LinearScorer, Router, TopK
from spectralmoe.selectors import Threshold


def slow(logits, k, theta, *, normalize=True, score="logit", fallback="topk"):
    """One token at a time, in float64: the experts, and the weights of all (N, E)."""
    choices, weights = [], []
    for row in logits:
        values = {
            "logit": list,
            "softmax": lambda row: [v.exp() / row.exp().sum() for v in row],
            "sigmoid": lambda row: [1 / (1 + (-v).exp()) for v in row],
        }[score](row)
        best = sorted(range(len(row)), key=lambda e: -row[e].item())[:k]
        chosen = [e for e in best if values[e] >= theta]
        if not chosen and fallback == "topk":
            chosen = best[:1]
        parts = {e: values[e].clamp_min(1e-6) for e in chosen}
        total = sum(parts.values()) if normalize else 1
        weights.append(torch.stack([parts[e] / total if e in parts else 0 * row[e] for e in range(len(row))]))
        choices.append(chosen)
    return choices, torch.stack(weights)


def dense(indices, weights, experts):
    """The weights (N, K) as (N, E)."""
    zeros = weights.new_zeros(len(weights), experts + 1)
    return zeros.scatter_add(1, indices % (experts + 1), weights)[:, :experts]


@pytest.mark.parametrize("fallback", ["topk", "none"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("score", "theta"), [("logit", 0.5), ("logit", -0.5), ("softmax", 0.3), ("sigmoid", 0.6)])
def test_equation(score, theta, normalize, fallback, same):
    form = {"normalize": normalize, "score": score, "fallback": fallback}
    logits = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    selector = Threshold(3, theta, **form)
    indices = selector.choose(logits.detach())
    choices, weights = slow(logits, 3, theta, **form)
    assert [[e for e in row if e >= 0] for row in indices.tolist()] == choices
    same(dense(indices, selector.weigh(logits, indices), 6), weights, [logits])


def test_by_hand():
    logits = torch.tensor([[0.2, 0.9, 0.6, 0.7], [0.1, 0.5, 0.2, 0.4], [0.3, 0.1, -0.4, 0.2], [-0.1, -0.2, -0.3, -0.4]])
    selector = Threshold(2)
    indices = selector.choose(logits)
    assert indices.tolist() == [[1, 3], [1, -1], [0, -1], [0, -1]]
    weights = selector.weigh(logits, indices)
    assert weights.tolist()[0] == pytest.approx([0.9 / 1.6, 0.7 / 1.6])
    assert weights[1:].tolist() == [[1, 0]] * 3
    assert Threshold(2, fallback="none").choose(logits).tolist() == [[1, 3], [1, -1], [-1, -1], [-1, -1]]


def test_a_threshold_that_all_reach_leaves_top_k():
    logits = torch.rand(30, 6) + 0.01
    assert torch.equal(Threshold(3, 0.0).choose(logits), TopK(3).choose(logits))
    one, two = (Router(LinearScorer(8, 6), s) for s in (Threshold(3, -math.inf, score="sigmoid"), TopK(3)))
    two.load_state_dict(one.state_dict())
    x = torch.randn(9, 8)
    assert torch.equal(one(x).indices, two(x).indices)


def test_masked_rows_and_tokens_without_an_expert_are_inert(gradients):
    logits = torch.tensor([[-1.0, -2.0], [3.0, 1.0], [-5.0, -1.0]], requires_grad=True)
    mask = torch.tensor([True, False, True])
    selector = Threshold(2, fallback="none")
    indices = selector.choose(logits.detach(), mask=mask)
    weights = selector.weigh(logits, indices)
    assert (indices == -1).all()
    assert not weights.any()
    assert not gradients(weights.sum(), [logits])[0].any()
    assert Threshold(2).choose(logits.detach(), mask=mask).tolist() == [[0, -1], [-1, -1], [1, -1]]


def test_mistakes_are_named(user_error):
    with user_error("Threshold", "k=1", "normalize"):
        Threshold(1)
    with user_error("Threshold", "at least 1", "0"):
        Threshold(0)
    with user_error("score 'cosine'", "logit, sigmoid, softmax"):
        Threshold(2, score="cosine")
    with user_error("fallback 'all'", "none, topk"):
        Threshold(2, fallback="all")
    with user_error("Threshold", "nan"):
        Threshold(2, math.nan)
    with user_error("Threshold", "k=5", "E=4"):
        Router(LinearScorer(8, 4), Threshold(5))

"""Top-k and soft routing: w_tj = p_{t, i_j}, or renormalised over the slots."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from spectralmoe import LinearScorer, Router, Soft, TopK

forms = pytest.mark.parametrize(("score", "normalize"), [(s, n) for s in ("softmax", "sigmoid") for n in (False, True)])


def slow(logits, k, score, normalize):
    """One token at a time, in float64."""
    indices, weights = [], []
    for row in logits:
        shares = [v.exp() for v in row] if score == "softmax" else [1 / (1 + (-v).exp()) for v in row]
        total = sum(shares) if score == "softmax" else 1
        order = sorted(range(len(row)), key=lambda e: -row[e].item())[:k] if k else list(range(len(row)))
        chosen = [shares[e] / total for e in order]
        weights.append(torch.stack([w / sum(chosen) if normalize else w for w in chosen]))
        indices.append(order)
    return torch.tensor(indices), torch.stack(weights)


@forms
@pytest.mark.parametrize("k", [2, 5, None], ids=str)
def test_equation(score, normalize, k, same):
    form = {"normalize": normalize, "score": score}
    selector = Soft(**form) if k is None else TopK(k, **form)
    logits = 2 * torch.randn(20, 5, dtype=torch.float64)
    logits.requires_grad_()
    indices, weights = slow(logits.detach(), k, score, normalize)[0], slow(logits, k, score, normalize)[1]
    assert torch.equal(selector.choose(logits.detach()), indices)
    same(selector.weigh(logits, indices), weights, [logits])


def test_by_hand(close):
    logits = torch.tensor([[0.5, 0.2, 0.3]]).log()
    assert TopK(2).choose(logits).tolist() == [[0, 2]]
    close(TopK(2).weigh(logits, torch.tensor([[0, 2]])), [[0.5, 0.3]])
    close(TopK(2, normalize=True).weigh(logits, torch.tensor([[0, 2]])), [[0.625, 0.375]])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_renormalised_weights_survive_where_scores_underflow(score, close, gradients):
    logits = torch.tensor([[-300.0, -301.0, -500.0]], requires_grad=True)
    weights = TopK(2, normalize=True, score=score).weigh(logits, torch.tensor([[0, 1]]))
    close(weights, torch.tensor([[0.0, -1.0]]).softmax(-1))
    assert gradients(weights[0, 0], [logits])[0].abs().sum() > 0.1


@forms
def test_empty_slots_weigh_nothing(score, normalize, close, gradients):
    logits = torch.randn(3, 5, requires_grad=True)
    indices = torch.tensor([[1, -1], [-1, -1], [0, 4]])
    weights = TopK(2, score=score, normalize=normalize).weigh(logits, indices)
    assert not weights[indices < 0].any()
    if normalize:
        close(weights.sum(-1), torch.tensor([1.0, 0.0, 1.0]))
    with torch.autograd.set_detect_anomaly(True):  # no nan on the way either
        (grad,) = gradients(TopK(2, score=score, normalize=normalize).weigh(logits, indices).square().sum(), [logits])
    assert grad.isfinite().all()
    assert not grad[1].any()


def test_all_experts_is_soft_routing():
    for selector, soft in ((Soft(), True), (TopK(4), True), (TopK(2), False)):
        router = Router(LinearScorer(8, 4), selector)
        routing = router(torch.randn(30, 8))
        assert (routing.soft, router.soft) == (soft, soft)
        if soft:  # the load is where the largest weight is, not the number of rows
            top = routing.logits.argmax(-1)
            assert torch.equal(routing.load(), top.bincount(minlength=4) / 30)


def test_mistakes_are_named(user_error):
    with user_error("TopK", "k must be at least 1", "0"):
        TopK(0)
    with user_error("TopK", "k must be at least 1 and a Python int", "int64 2"):
        TopK(np.int64(2))
    with user_error("TopK", "k=1", "normalize"):
        TopK(1, normalize=True)
    with user_error("TopK", "None", "Soft()"):
        TopK(None)
    for make in (Soft, partial(TopK, 2)):
        with user_error("score", "'hardmax'", "sigmoid", "softmax"):
            make(score="hardmax")
    with user_error("TopK", "k=5", "E=4"):
        Router(LinearScorer(8, 4), TopK(5))

"""Top-p: the smallest set of experts, best first, that gathers p."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectralmoe import LinearScorer, Router, TopP


def slow(logits, p, max_k=None, score="softmax"):
    """One token at a time, in float64."""
    result = []
    for row in logits:
        shares = (row.exp() if score == "softmax" else 1 / (1 + (-row).exp())).tolist()
        chosen, gathered = [], 0.0
        for e in sorted(range(len(row)), key=lambda e: -shares[e])[:max_k]:
            if chosen and gathered >= p:
                break
            chosen.append(e)
            gathered += shares[e] / sum(shares)
        result.append(chosen)
    return result


def used(indices):
    return [[e for e in row if e >= 0] for row in indices.tolist()]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("max_k", [None, 3], ids=str)
@pytest.mark.parametrize("p", [0.05, 0.4, 0.9, 1.0])
def test_equation(score, max_k, p):
    logits = torch.randn(40, 6, dtype=torch.float64)
    indices = TopP(p, max_k=max_k, score=score).choose(logits)
    assert used(indices) == slow(logits, p, max_k, score)
    assert indices.shape[1] == (max_k or 6)


@pytest.mark.parametrize("normalize", [False, True])
def test_weights(normalize, same):
    logits = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    selector = TopP(0.6, normalize=normalize)
    indices = selector.choose(logits.detach())
    kept = torch.zeros(40, 6, dtype=torch.float64)
    for t, row in enumerate(used(indices)):
        kept[t, row] = 1
    shares = logits.exp() / logits.exp().sum(-1, keepdim=True) * kept
    expected = shares / shares.sum(-1, keepdim=True) if normalize else shares
    dense = torch.zeros(40, 7, dtype=torch.float64).scatter_add(1, indices % 7, selector.weigh(logits, indices))[:, :6]
    same(dense, expected, [logits])


def test_by_hand():
    logits = torch.tensor([[0.2, 0.5, 0.3], [0.05, 0.05, 0.9]], dtype=torch.float64).log()
    assert TopP(0.5 - 1e-9).choose(logits).tolist() == [[1, -1, -1], [2, -1, -1]]
    assert TopP(0.7).choose(logits).tolist() == [[1, 2, -1], [2, -1, -1]]
    assert TopP(0.5).choose(torch.zeros(1, 4)).sort().values[0, :2].tolist() == [-1, -1]  # two of 1/4 reach 1/2


probabilities = st.floats(0.01, 1.0)


@given(p=probabilities, q=probabilities, seed=st.integers(0, 1000))
def test_a_larger_p_only_adds_experts(p, q, seed):
    logits = torch.randn(10, 6, generator=torch.Generator().manual_seed(seed))
    low, high = (used(TopP(v).choose(logits)) for v in sorted((p, q)))
    assert all(more[: len(few)] == few for few, more in zip(low, high, strict=True))
    assert all(few for few in low)


@given(p=probabilities, seed=st.integers(0, 1000))
def test_the_set_reaches_p_and_is_the_smallest(p, seed):
    logits = torch.randn(10, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for row, shares in zip(used(TopP(p).choose(logits)), logits.softmax(-1), strict=True):
        assert float(shares[row].sum()) >= p - 1e-12
        assert float(shares[row[:-1]].sum()) < p


def test_mistakes_are_named(user_error):
    for p in (0, 1.5, -0.1):
        with user_error("TopP", "(0, 1]", str(p)):
            TopP(p)
    with user_error("TopP", "k=1", "normalize"):
        TopP(0.5, max_k=1, normalize=True)
    with user_error("TopP", "at least 1", "0"):
        TopP(0.5, max_k=0)
    with user_error("TopP", "k=5", "E=4"):
        Router(LinearScorer(8, 4), TopP(0.5, max_k=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_underflow_keep_their_order(dtype):
    logits = torch.tensor([[-803.0, -801.0, -800.0, -802.0]], dtype=dtype)  # sigmoids in the ratios e^-3, e^-1, 1, e^-2
    assert not logits.sigmoid().any()
    for p, chosen in ((0.6, [2]), (0.8, [2, 1]), (0.95, [2, 1, 3]), (1.0, [2, 1, 3, 0])):
        assert used(TopP(p, score="sigmoid").choose(logits)) == [chosen]


def test_exact_ties_go_to_the_first_expert():
    """Scores that are equal, as those of sides that a token has no energy on, are taken in the order of the experts."""
    for experts in (8, 33, 64):
        logits = torch.zeros(5, experts)
        logits[:, experts // 2] = 1
        chosen = TopP(1.0, max_k=3).choose(logits)
        assert chosen.tolist() == [[experts // 2, 0, 1]] * 5

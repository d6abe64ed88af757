"""Capacity: at most ceil(f M / E) slots an expert; first choices first, earlier tokens first."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectralmoe import Balanced, Capacity, LinearScorer, NoisyTopK, Router, Soft, TopK, TopP


def slow(wanted, factor, experts):
    """One slot at a time."""
    filled = sum(e >= 0 for row in wanted for e in row)
    room = [math.ceil(filled * factor / experts)] * experts
    kept = [[-1] * len(row) for row in wanted]
    for slot in range(len(wanted[0]) if wanted else 0):
        for token, row in enumerate(wanted):
            if row[slot] >= 0 and room[row[slot]] > 0:
                room[row[slot]] -= 1
                kept[token][slot] = row[slot]
    return kept


def bounded(selector, logits, mask=None):
    """The choice under the bound."""
    return selector.limit(selector.choose(logits, mask=mask), logits.shape[1])


def route(logits, selector, mask=None):
    """The routing of tokens whose logits are the tokens themselves."""
    router = Router(LinearScorer(logits.shape[1], logits.shape[1]), selector)
    router.scorer.weight.data = torch.eye(logits.shape[1])
    return router(logits, mask=mask)


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.25, 9.0])
@pytest.mark.parametrize("inner", [TopK(2), TopP(0.6)], ids=["topk", "topp"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_equation(factor, inner, masked):
    logits = torch.randn(40, 5) + torch.tensor([2.0, 0, 0, 0, 0])
    mask = torch.rand(40) < 0.5 if masked else None
    selector = Capacity(inner, factor)
    wanted = inner.choose(logits, mask=mask)
    kept = bounded(selector, logits, mask)
    assert kept.tolist() == slow(wanted.tolist(), factor, 5)
    lost = int((wanted >= 0).sum() - (kept >= 0).sum())
    routing = route(logits, selector, mask)
    assert routing.indices.tolist() == kept.tolist()
    assert float(routing.dropped()) == pytest.approx(lost / int((wanted >= 0).sum()))


@given(
    tokens=st.integers(0, 30),
    k=st.integers(1, 3),
    factor=st.floats(0.05, 3),
    lead=st.floats(0, 5),
    seed=st.integers(0, 1000),
)
def test_it_keeps_its_bound_and_only_empties_slots(tokens, k, factor, lead, seed):
    logits = torch.randn(tokens, 4, generator=torch.Generator().manual_seed(seed))
    logits = logits + lead * torch.tensor([1.0, 0, 0, 0])
    wanted, kept = TopK(k).choose(logits), bounded(Capacity(TopK(k), factor), logits)
    bound = math.ceil(tokens * k * factor / 4 - 1e-9)
    assert all(int((kept == e).sum()) <= bound for e in range(4))
    assert ((kept == wanted) | (kept == -1)).all()
    for e in range(4):  # and no more than it must
        assert int((kept == e).sum()) == min(bound, int((wanted == e).sum()))


def test_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [1.0, 2.0, 0.0]])
    selector = Capacity(TopK(2), 1.0)  # room for two slots an expert; both of expert 1's go to a first choice first
    assert bounded(selector, logits).tolist() == [[0, 1], [0, -1], [1, -1]]
    assert float(route(logits, selector).dropped()) == pytest.approx(2 / 6)


def test_scores_and_weights_are_the_inner_selectors():
    inner = Balanced(2, normalize=False, rate=0.5)
    router = Router(LinearScorer(8, 4), Capacity(inner, 1.0))
    routing = router(torch.randn(30, 8))
    assert torch.equal(routing.scores, inner.scores(routing.logits))
    assert torch.equal(routing.weights, inner.weigh(routing.logits, routing.indices))


def test_no_token_drops_nothing():
    assert float(route(torch.zeros(0, 4), Capacity(TopK(2), 1.0)).dropped()) == 0
    assert float(route(torch.zeros(5, 4), TopK(2)).dropped()) == 0


def test_noise_does_not_change_what_was_dropped():
    routing = route(torch.randn(200, 4), Capacity(NoisyTopK(2, noise_std=1.0), 0.5))
    assert float(routing.dropped()) == pytest.approx(1 - int((routing.indices >= 0).sum()) / 400)


def test_mistakes_are_named(user_error):
    with user_error("Capacity", "factor", "0"):
        Capacity(TopK(2), 0)
    for soft in (Soft(), TopK(4)):
        with user_error("Capacity", "soft"):
            Router(LinearScorer(8, 4), Capacity(soft, 1.0))
    with user_error("TopK", "k=5", "E=4"):
        Router(LinearScorer(8, 4), Capacity(TopK(5), 1.0))

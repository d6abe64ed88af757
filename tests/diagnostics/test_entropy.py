"""Entropies against loops, at their ends, and under what must not matter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectralmoe import LinearScorer, Router, TopK
from spectralmoe.diagnostics import mean_entropy, token_entropies, token_entropy
from spectralmoe.routing import Routing


def routing_of(scores, mask=None):
    n = len(scores)
    return Routing(scores, torch.ones(n, 1), torch.zeros(n, 1, dtype=torch.int64), scores, mask)


@st.composite
def routings(draw, least_experts=2):
    n, e = draw(st.integers(1, 6)), draw(st.integers(least_experts, 7))
    numbers = st.one_of(st.just(0.0), st.floats(1e-6, 1e3))
    scores = draw(st.lists(st.lists(numbers, min_size=e, max_size=e), min_size=n, max_size=n))
    mask = draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=n, max_size=n)))
    return routing_of(torch.tensor(scores, dtype=torch.float64), None if mask is None else torch.tensor(mask))


def shares(routing):
    real = [True] * len(routing.scores) if routing.mask is None else routing.mask.tolist()
    return [[s / sum(row) for s in row] for row, r in zip(routing.scores.tolist(), real, strict=True) if r and any(row)]


def entropy(p):
    return -sum(v * math.log(v) for v in p if v > 0) / math.log(len(p))


@given(routing=routings())
def test_definitions(routing):
    rows = shares(routing)
    tokens, mean = token_entropy(routing), mean_entropy(routing)
    assert tokens.data == mean.data == len(rows)
    if not rows:
        assert tokens.value is None
        assert mean.value is None
        return
    assert tokens.value == pytest.approx(sum(map(entropy, rows)) / len(rows), abs=1e-12)
    centre = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    assert mean.value == pytest.approx(entropy(centre), abs=1e-12)


@given(routing=routings(), data=st.data())
def test_bounds_order_and_scale(routing, data):
    tokens, mean = token_entropy(routing), mean_entropy(routing)
    if not tokens.known:
        return
    assert -1e-12 <= tokens.value <= mean.value + 1e-12 <= 1 + 2e-12
    order = data.draw(st.permutations(range(routing.num_experts)))
    for other in (routing.scores[:, order], 17 * routing.scores):
        moved = routing_of(other, routing.mask)
        assert token_entropy(moved).value == pytest.approx(tokens.value, abs=1e-12)
        assert mean_entropy(moved).value == pytest.approx(mean.value, abs=1e-12)


def test_the_gap_is_what_the_expert_tells_of_the_token():
    even, one = torch.full((6, 3), 1 / 3), torch.eye(3).repeat(2, 1)
    assert (token_entropy(routing_of(even)).value, mean_entropy(routing_of(even)).value) == pytest.approx((1, 1))
    assert (token_entropy(routing_of(one)).value, mean_entropy(routing_of(one)).value) == pytest.approx((0, 1))
    same = torch.eye(3)[:1].expand(6, 3)
    assert (token_entropy(routing_of(same)).value, mean_entropy(routing_of(same)).value) == pytest.approx((0, 0))


def test_per_token_is_what_the_mean_is_taken_of():
    routing = Router(LinearScorer(8, 5), TopK(2))(torch.randn(40, 8))
    each = token_entropies(routing)
    assert each.shape == (40,)
    assert token_entropy(routing).value == pytest.approx(float(each.mean()), abs=1e-12)
    assert not each.requires_grad


def test_padding_does_not_count_whatever_it_holds():
    scores = torch.rand(5, 4)
    want = token_entropy(routing_of(scores[:3])).value
    scores[3:] = math.nan
    mask = torch.tensor([True, True, True, False, False])
    for measure in (token_entropy, mean_entropy):
        assert measure(routing_of(scores, mask)) == measure(routing_of(scores[:3]))
        assert measure(routing_of(scores)).value is None
    assert token_entropy(routing_of(scores, mask)).value == want


def test_scores_below_zero_are_no_share():
    """A sigmoid plus a selection bias may fall below 0."""
    scores = torch.tensor([[0.5, 0.5, -0.2], [0.5, 0.5, -0.1]])
    for measure in (token_entropy, mean_entropy):
        assert measure(routing_of(scores)).value == pytest.approx(math.log(2) / math.log(3))


def test_no_data():
    for routing in (routing_of(torch.ones(4, 1)), routing_of(torch.ones(0, 4)), routing_of(torch.zeros(3, 4))):
        for measure in (token_entropy, mean_entropy):
            assert measure(routing).value is None

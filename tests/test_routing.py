"""Routing: exact counts, the load, means over real tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectralmoe import LinearScorer, Router, Routing, TopK
from spectralmoe.routing import count_slots
from spectralmoe.selectors import Capacity

slots = st.lists(st.lists(st.integers(-1, 4), min_size=3, max_size=3), max_size=20)


def routing_of(indices, weights=None, *, experts=5, mask=None, soft=False):
    indices = torch.tensor(indices, dtype=torch.int64).reshape(-1, len(indices[0]) if indices else 3)
    weights = (indices >= 0).float() if weights is None else torch.tensor(weights)
    logits = torch.randn(indices.shape[0], experts)
    return Routing(logits, weights, indices, logits.softmax(-1), mask, (indices.shape[0],), soft)


@given(indices=slots)
def test_counts_and_load(indices):
    routing = routing_of(indices)
    flat = [e for row in indices for e in row]
    counts = routing.counts()
    assert counts.dtype == torch.int64
    assert counts.tolist() == [flat.count(e) for e in range(5)]
    filled = sum(e >= 0 for e in flat)
    assert float(routing.load().sum()) == pytest.approx(1 if filled else 0)
    assert routing.load().tolist() == pytest.approx([flat.count(e) / max(filled, 1) for e in range(5)])


def test_counts_are_exact_where_fp32_is_not():
    many = 2**24 + 1
    assert count_slots(torch.zeros(many, dtype=torch.int64), 2).tolist() == [many, 0]


def test_slots_of_no_expert_are_not_counted():
    assert count_slots(torch.tensor([[0, -1], [2, 1], [7, 1]]), 2).tolist() == [1, 2]


def test_the_load_of_soft_routing_is_where_the_largest_weight_is():
    routing = routing_of([[0, 1], [0, 1], [0, 1]], [[0.4, 0.6], [0.7, 0.3], [0.1, 0.9]], experts=2, soft=True)
    assert routing.counts().tolist() == [3, 3]
    assert routing.load().tolist() == pytest.approx([1 / 3, 2 / 3])


def test_top_expert():
    routing = routing_of([[2, 0], [3, -1], [-1, -1], [1, 4]], [[0.1, 0.2], [0.5, 0.0], [0.0, 0.0], [0.9, 0.1]])
    assert routing.top_expert().tolist() == [0, 3, -1, 1]
    assert dataclasses.replace(routing, indices=routing.indices[:, :0]).top_expert().tolist() == [-1] * 4


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_scores_follow_from_the_logits_with_gradient_or_are_given(score, close):
    logits = torch.randn(6, 4, requires_grad=True)
    routing = Routing(logits, torch.ones(6, 1), torch.zeros(6, 1, dtype=torch.int64), score)
    expected = logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)
    close(routing.scores, expected.float() if score == "softmax" else (1 / (1 + (-logits.double()).exp())).float())
    assert routing.scores.requires_grad
    given = torch.rand(6, 4)
    assert dataclasses.replace(routing, score=given).scores is given


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: Capacity(s, 2.0)], ids=["plain", "capacity"])
def test_a_router_leaves_scores_to_their_readers_unless_the_selector_has_its_own(wrap):
    class Halved(TopK):
        def scored(self, logits):
            return logits.softmax(-1) / 2

    class HalvedCapacity(Capacity):
        def scored(self, logits):
            return logits.softmax(-1) / 2

    x = torch.randn(5, 8)
    halved = Router(LinearScorer(8, 4), HalvedCapacity(TopK(2), 2.0))(x)
    assert torch.equal(halved.scores, halved.logits.softmax(-1) / 2)
    plain, own = (Router(LinearScorer(8, 4), wrap(kind(2)))(x) for kind in (TopK, Halved))
    assert plain.score == "softmax"
    assert torch.equal(plain.scores, plain.logits.softmax(-1))
    assert torch.equal(own.scores, own.logits.softmax(-1) / 2)


def test_probs_know_the_precision_of_the_scores(close):
    logits = torch.zeros(2, 3, dtype=torch.float16)
    routing = Routing(logits, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64), torch.full((2, 3), 0.01))
    close(routing.probs, torch.full((2, 3), 1 / 3))


def test_probs_are_scores_normalised(close):
    logits = torch.randn(6, 5)
    routing = Routing(logits, torch.ones(6, 1), torch.zeros(6, 1, dtype=torch.int64), logits.sigmoid())
    close(routing.probs, logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True))


@pytest.mark.parametrize("shape", [(8,), (8, 3)], ids=str)
def test_means_are_over_real_tokens(shape, close):
    values, mask = torch.randn(shape), torch.tensor([1, 0, 1, 1, 0, 0, 1, 0]).bool()
    close(routing_of([[0]] * 8).real(values), values.mean(0))
    close(routing_of([[0]] * 8, mask=mask).real(values), values[mask].mean(0))
    nobody = routing_of([[0]] * 8, mask=torch.zeros(8, dtype=torch.bool))
    assert torch.equal(nobody.real(values), torch.zeros(shape[1:]))
    broken = values.masked_fill(~mask.reshape(-1, *[1] * (len(shape) - 1)), torch.nan)
    close(routing_of([[0]] * 8, mask=mask).real(broken), values[mask].mean(0))


def test_it_unpacks_as_transformers_does_and_stays_as_it_is():
    routing = routing_of([[0, 1], [2, -1]])
    logits, weights, indices = routing
    assert (logits is routing.logits, weights is routing.weights, indices is routing.indices) == (True,) * 3
    assert routing.num_experts == 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        routing.weights = weights


def test_wrappers_see_the_tensors_inside():
    routing = routing_of([[0, 1], [2, -1]])
    doubled = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t * 2, routing)
    assert torch.equal(doubled.logits, 2 * routing.logits)
    assert (doubled.shape, doubled.soft) == (routing.shape, routing.soft)

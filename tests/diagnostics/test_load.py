"""Load metrics against their definitions, at their ends and in between."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectralmoe import Capacity, LinearScorer, Router, Soft, TopK, TopP
from spectralmoe.diagnostics import (
    DEAD_SHARE,
    concentration,
    dead_experts,
    gini,
    max_share,
    max_vio,
    min_share,
    per_sequence,
)

counts = st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(any)


def load_of(values):
    return torch.tensor(values, dtype=torch.float64) / sum(values)


@given(values=counts)
def test_definitions(values):
    load, e = [v / sum(values) for v in values], len(values)
    pairs = sum(abs(a - b) for a in load for b in load)
    tensor = load_of(values)
    assert max_vio(tensor) == pytest.approx(max(load) * e - 1, abs=1e-10)
    assert gini(tensor) == pytest.approx(pairs / (2 * e * sum(load)), abs=1e-10)
    assert min_share(tensor) == pytest.approx(min(load), abs=1e-10)
    assert max_share(tensor) == pytest.approx(max(load), abs=1e-10)
    assert dead_experts(tensor) == sum(v * e < DEAD_SHARE * sum(values) for v in values)


@given(values=counts)
def test_ranges(values):
    load, e = load_of(values), len(values)
    assert -1e-12 <= max_vio(load) <= e - 1 + 1e-12
    assert -1e-12 <= gini(load) <= (e - 1) / e + 1e-12
    assert 0 <= min_share(load) <= 1 / e
    assert 0 <= dead_experts(load) < e


@given(values=counts, data=st.data())
def test_the_order_of_the_experts_does_not_matter(values, data):
    other = data.draw(st.permutations(values))
    for metric in (max_vio, gini, min_share, max_share, dead_experts):
        assert metric(load_of(values)) == pytest.approx(metric(load_of(other)), abs=1e-12)


@pytest.mark.parametrize("experts", [1, 2, 8, 64])
def test_even_load_and_collapse(experts):
    even = torch.full((experts,), 1 / experts)
    assert (max_vio(even), gini(even), dead_experts(even)) == pytest.approx((0, 0, 0), abs=1e-6)
    collapse = torch.eye(experts)[0]
    assert max_vio(collapse) == experts - 1
    assert gini(collapse) == pytest.approx((experts - 1) / experts, abs=1e-6)
    assert dead_experts(collapse) == experts - 1


def test_no_load_has_no_metric():
    for metric in (max_vio, gini, min_share, max_share, lambda load: concentration(load, 1)):
        assert math.isnan(metric(torch.zeros(4)))


@given(values=counts, k=st.integers(0, 13), data=st.data())
def test_concentration(values, k, data):
    load, e = load_of(values), len(values)
    found = concentration(load, k)
    if not 1 <= k < e:
        assert math.isnan(found)
        return
    busiest = sum(sorted(values, reverse=True)[:k]) / sum(values)
    assert found == pytest.approx((busiest - k / e) / (1 - k / e), abs=1e-10)
    assert -1e-12 <= found <= 1 + 1e-12
    assert concentration(load_of(data.draw(st.permutations(values))), k) == pytest.approx(found, abs=1e-12)
    assert concentration(load_of([7 * v for v in values]), k) == pytest.approx(found, abs=1e-12)


def test_concentration_at_its_ends():
    for k in (1, 2, 5):
        assert concentration(torch.full((8,), 1 / 8), k) == pytest.approx(0, abs=1e-6)
        onto_k = torch.zeros(8)
        onto_k[-k:] = 1 / k
        assert concentration(onto_k, k) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("selector", [TopK(1), TopK(3), Soft(), TopP(0.5), Capacity(TopK(2), 1.0)])
@pytest.mark.parametrize("shape", [(4, 7), (3, 2, 5)])
def test_sequences_one_by_one(selector, shape):
    router, x = Router(LinearScorer(6, 5), selector), torch.randn(*shape, 6)
    mask = torch.rand(shape) < 0.7
    mask[0] = False
    routing = router(x, mask=mask)
    found = per_sequence(routing)
    assert found.dtype == torch.int64
    want = torch.zeros_like(found)
    for token in range(len(routing.indices)):
        row = routing.indices[token].tolist()
        if routing.soft and row[0] >= 0:
            row = [int(routing.weights[token].argmax())]
        for e in row:
            if e >= 0:
                want[token * shape[0] // len(routing.indices), e] += 1
    assert torch.equal(found, want)
    assert torch.equal(found.sum(0), routing.load_counts())
    assert math.isnan(max_vio(found[0].double()))


def test_a_batch_hides_what_its_sequences_do():
    router = Router(LinearScorer(2, 2), TopK(1))
    router.scorer.weight.data = torch.eye(2)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[:, None].expand(2, 9, 2)
    routing = router(x)
    assert max_vio(routing.load()) == 0
    assert [max_vio(row.double()) for row in per_sequence(routing)] == [1, 1]


def test_no_sequences():
    router = Router(LinearScorer(6, 5), TopK(2))
    assert per_sequence(router(torch.randn(9, 6))).shape == (0, 5)
    assert per_sequence(router(torch.randn(0, 4, 6))).shape == (0, 5)
    assert per_sequence(router(torch.randn(3, 0, 6))).tolist() == [[0] * 5] * 3

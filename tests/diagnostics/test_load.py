"""Load metrics against their definitions, at their ends and in between."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectralmoe.diagnostics import DEAD_SHARE, dead_experts, gini, max_vio, min_share

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
    for metric in (max_vio, gini, min_share, dead_experts):
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
    for metric in (max_vio, gini, min_share):
        assert math.isnan(metric(torch.zeros(4)))

"""Paths: tables against loops, mutual information against scikit-learn, its bias against chance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectralmoe import Capacity, LinearScorer, Router, Soft, TopK, TopP
from spectralmoe.diagnostics import co_activation, joint_counts, mutual_information, paths
from spectralmoe.routing import Routing

SELECTORS = {
    "top-1": TopK(1),
    "top-3": TopK(3),
    "soft": Soft(),
    "top-p": TopP(0.5),
    "capacity": Capacity(TopK(2), 0.7),
}
kinds = st.sampled_from(list(SELECTORS))
seeds = st.integers(0, 10**6)


def route(x, kind, experts=5, mask=None):
    return Router(LinearScorer(x.shape[-1], experts), SELECTORS[kind])(x, mask=mask)


def favourites(routing):
    """The expert with the largest weight of each token, None without one."""
    found = []
    for experts, weights in zip(routing.indices.tolist(), routing.weights.tolist(), strict=True):
        filled = [(w, e) for w, e in zip(weights, experts, strict=True) if e >= 0]
        found.append(max(filled)[1] if filled else None)
    return found


def table(rows):
    return torch.tensor(rows, dtype=torch.int64)


@given(seed=seeds, first=kinds, second=kinds)
def test_joint_counts_by_loops(seed, first, second):
    torch.manual_seed(seed)
    x, mask = torch.randn(25, 6), torch.rand(25) < 0.8
    a, b = route(x, first, 5, mask), route(x, second, 3, mask)
    want = torch.zeros(5, 3, dtype=torch.int64)
    for i, j in zip(favourites(a), favourites(b), strict=True):
        if i is not None and j is not None:
            want[i, j] += 1
    found = joint_counts(a, b)
    assert found.dtype == torch.int64
    assert torch.equal(found, want)
    assert torch.equal(joint_counts(b, a), want.T)


def test_joint_counts_of_no_tokens_and_of_other_tokens(user_error):
    a, b = route(torch.randn(4, 6), "top-1"), route(torch.randn(5, 6), "top-1")
    with user_error("joint_counts", "N=4", "N=5"):
        joint_counts(a, b)
    empty = route(torch.randn(0, 6), "top-3")
    assert joint_counts(empty, empty).tolist() == [[0] * 5] * 5
    assert mutual_information(joint_counts(empty, empty)).value is None


def corrected(counts):
    """Shannon entropy in nats with Miller's correction."""
    n, filled = sum(counts), [c for c in counts if c]
    return -sum(c / n * math.log(c / n) for c in filled) + (len(filled) - 1) / (2 * n)


@given(
    rows=st.integers(1, 4).flatmap(
        lambda b: st.lists(st.lists(st.integers(0, 60), min_size=b, max_size=b), min_size=1, max_size=4)
    )
)
def test_information_by_scikit_learn(rows):
    joint = table(rows)
    metrics = pytest.importorskip("sklearn.metrics")
    pairs = [(i, j) for i, row in enumerate(rows) for j, count in enumerate(row) for _ in range(count)]
    found, n, cells = mutual_information(joint), len(pairs), int((joint > 0).sum())
    sides = [[int(v) for v in joint.sum(axis)] for axis in (1, 0)]
    occupied = [sum(v > 0 for v in side) for side in sides]
    assert found.data == n
    if not n or n < paths.CELL_TOKENS * cells or min(occupied) < 2:
        assert found.value is None
        return
    plain = metrics.mutual_info_score(*zip(*pairs, strict=True))
    information = plain - (cells - sum(occupied) + 1) / (2 * n)
    assert found.value == pytest.approx(max(information, 0) / min(map(corrected, sides)), abs=1e-9)
    assert 0 <= found.value <= 1


@given(rows=st.lists(st.lists(st.integers(0, 60), min_size=3, max_size=3), min_size=2, max_size=4), data=st.data())
def test_names_and_sides_do_not_matter(rows, data):
    joint = table(rows)
    found = mutual_information(joint)
    order = data.draw(st.permutations(range(len(rows))))
    for other in (joint.T, joint[order], joint.flip(1)):
        same = mutual_information(other)
        assert (same.data, same.needs) == (found.data, found.needs)
        assert same.value == (None if found.value is None else pytest.approx(found.value, abs=1e-12))


def test_information_at_its_ends():
    assert mutual_information(torch.diag(table([40, 60, 9]))).value == pytest.approx(1)
    assert mutual_information(table([[40, 0, 0], [0, 60, 9]])).value == pytest.approx(1)  # all that the rows could tell
    assert mutual_information(table([[40, 60], [40, 60]])).value == 0
    assert mutual_information(table([[40, 60]])).value is None  # a side that never varies tells nothing, nor not


def test_independent_layers_have_none_though_counts_scatter():
    draws = torch.randint(0, 16, (2, 6000))
    joint = torch.zeros(16, 16, dtype=torch.int64).index_put_(
        tuple(draws), torch.ones(6000, dtype=torch.int64), accumulate=True
    )
    found = mutual_information(joint)
    assert found.value < 0.003
    plain = 15 * 15 / (2 * 6000) / math.log(16)
    assert plain > 0.006  # what it would be without the correction


def test_too_few_tokens_for_the_table_is_no_data():
    draws = torch.randint(0, 16, (2, 500))
    joint = torch.zeros(16, 16, dtype=torch.int64).index_put_(
        tuple(draws), torch.ones(500, dtype=torch.int64), accumulate=True
    )
    found = mutual_information(joint)
    assert found.value is None
    assert found.needs == 5 * int((joint > 0).sum())
    assert mutual_information(20 * joint, unit="slots").unit == "slots"


@pytest.mark.parametrize("chunk", [7, 2**16])
@pytest.mark.parametrize("kind", list(SELECTORS))
def test_co_activation_by_loops(kind, chunk, monkeypatch):
    monkeypatch.setattr(paths, "_CHUNK", chunk)
    routing = route(torch.randn(30, 6), kind, mask=torch.rand(30) < 0.8)
    want = torch.zeros(5, 5, dtype=torch.int64)
    for experts in routing.indices.tolist():
        served = [e for e in experts if e >= 0]
        for i in served:
            for j in served:
                want[i, j] += 1
    found = co_activation(routing)
    assert found.dtype == torch.int64
    assert torch.equal(found, want)
    assert torch.equal(found.diagonal(), routing.counts())


def test_an_index_beyond_the_experts_is_an_empty_slot():
    logits = torch.zeros(2, 3)
    routing = Routing(logits, torch.ones(2, 2), table([[0, 3], [3, 3]]), logits)
    assert co_activation(routing).tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert joint_counts(routing, routing).sum() == 1

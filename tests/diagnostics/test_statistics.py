"""Running sums of a layer against loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch

from spectralmoe import Capacity, LinearScorer, Router, TopK
from spectralmoe.diagnostics import Evidence, measured
from spectralmoe.diagnostics.load import dead_experts, gini, max_vio
from spectralmoe.diagnostics.stability import NEAR
from spectralmoe.diagnostics.statistics import LayerStatistics

E, K, D = 5, 2, 8


@pytest.fixture
def routings():
    router = Router(LinearScorer(D, E), TopK(K))
    batches = [torch.randn(3, 40, D), torch.randn(3, 40, D)]
    masks = [torch.rand(3, 40) > 0.3, torch.ones(3, 40, dtype=torch.bool)]
    return [router(x, mask=mask) for x, mask in zip(batches, masks, strict=True)]


@pytest.fixture
def statistics(routings):
    found = LayerStatistics(E, K)
    for routing in routings:
        found.add(routing)
    return found


def values(statistics):
    """All that the table makes of these sums."""
    groups = measured(Evidence(statistics, statistics), {"counts", "routing"})
    return {name: block for name, block in groups.items() if block}


def tokens(routings):
    """The real tokens one by one: probabilities, indices, weights."""
    for routing in routings:
        for row in range(len(routing.logits)):
            if routing.mask[row]:
                yield routing.probs[row].double().tolist(), routing.indices[row].tolist(), routing.weights[row].tolist()


def test_counts_are_those_of_the_indices(routings, statistics):
    counts = [0] * E
    for _, indices, _ in tokens(routings):
        for e in indices:
            counts[e] += 1
    assert statistics.counts().tolist() == counts
    assert statistics.number("tokens") == len(list(tokens(routings)))
    share = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    for value in (max_vio, gini, dead_experts):
        assert statistics.of_share(value).value == pytest.approx(value(share))
        assert statistics.of_share(value).data == sum(counts)


def test_entropies_are_those_of_a_loop(routings, statistics):
    rows = [probs for probs, _, _ in tokens(routings)]

    def entropy(probs):
        return -sum(p * math.log(p) for p in probs) / math.log(E)

    single = sum(entropy(row) for row in rows) / len(rows)
    mean = entropy([sum(row[e] for row in rows) / len(rows) for e in range(E)])
    assert statistics.token_entropy().value == pytest.approx(single, abs=1e-6)
    assert statistics.mean_entropy().value == pytest.approx(mean, abs=1e-6)


def test_margins_and_ties_are_those_of_a_loop(routings, statistics):
    gaps = []
    for probs, indices, _ in tokens(routings):
        worst, best = min(probs[e] for e in indices), max(probs[e] for e in range(E) if e not in indices)
        gaps.append((worst - best) / worst)
    assert statistics.margin().value == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)
    assert statistics.near_tie().value == pytest.approx(sum(gap <= NEAR for gap in gaps) / len(gaps))


def test_shares_of_weight_are_those_of_a_loop(routings, statistics):
    carried = [0.0] * E
    for _, indices, weights in tokens(routings):
        for e, weight in zip(indices, weights, strict=True):
            carried[e] += weight
    assert statistics.weights()["share"] == pytest.approx([value / sum(carried) for value in carried], abs=1e-6)
    assert not statistics.weights()["constant"]


def test_sequences_are_judged_one_by_one(routings, statistics):
    values = []
    for routing in routings:
        for row in range(3):
            part = routing.indices.view(3, 40, K)[row]
            counts = torch.bincount(part[part >= 0], minlength=E)
            if counts.sum() >= 10 * E:
                values.append(float(counts.max() / counts.double().mean() - 1))
    found = statistics.of_sequences("sequence_vio")
    assert found.data == len(values)
    assert found.value == pytest.approx(sum(values) / len(values))


def test_sums_add_up_over_ranks(routings, statistics):
    parts = [LayerStatistics(E, K) for _ in routings]
    for part, routing in zip(parts, routings, strict=True):
        part.add(routing)
    total = LayerStatistics(E, K)
    total.ints, total.sums = sum(part.ints for part in parts), sum(part.sums for part in parts)
    assert values(total) == values(statistics)


def test_drops_are_counted():
    routing = Router(LinearScorer(D, E), Capacity(TopK(K), factor=0.5))(torch.randn(100, D))
    statistics = LayerStatistics(E, K)
    statistics.add(routing)
    assert statistics.dropped().value == pytest.approx(float(routing.dropped()))
    assert statistics.dropped().data == 200


def test_too_few_tokens_say_nothing():
    statistics = LayerStatistics(E, K)
    statistics.add(Router(LinearScorer(D, E), TopK(K))(torch.randn(20, D)))
    for seen in (statistics, LayerStatistics(E, K)):
        assert {measure["value"] for block in values(seen).values() for measure in block.values()} == {None}


def test_a_constant_weight_is_seen():
    statistics = LayerStatistics(E, 1)
    statistics.add(Router(LinearScorer(D, E), TopK(1, normalize=False))(torch.randn(100, D)))
    assert not statistics.weights()["constant"]

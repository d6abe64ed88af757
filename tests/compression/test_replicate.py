"""Replicas compute what the expert did, and share its tokens evenly."""

from __future__ import annotations

import pytest
import torch
from seeds import generator

from spectralmoe import FeedForward, LinearScorer, MoE, Placement, Router, Soft, TopK, load, record, save
from spectralmoe.compression import replicas_by_load, replicate

D, E = 12, 5


def layer_of(*, experts=E, k=2, **options):
    return MoE(
        Router(LinearScorer(D, experts), Soft() if k is None else TopK(k)), FeedForward(E, D, 8, bias=True), **options
    )


@pytest.mark.grid(copies=[[2, 1, 4, 1, 1], [1] * E, [3] * E], k=[1, 2, None], dispatch=["auto", "loop", "grouped"])
def test_the_function_stays(copies, k, dispatch, close):
    layer, x = layer_of(k=k, dispatch=dispatch), torch.randn(40, D)
    many = replicate(layer, copies)
    assert many.experts.num_experts == sum(copies)
    close(many(x), layer(x))
    assert torch.equal(many.router(x).indices, layer.router(x).indices)


def test_one_of_each_is_the_identity():
    layer, x = layer_of(), torch.randn(9, D)
    with record(layer) as tape:
        layer(x)
    for copies in ([1] * E, 0):
        same = replicate(layer, copies, evidence=tape)
        assert same.placement is None
        assert torch.equal(same(x), layer(x))


def test_the_busiest_get_the_slots_and_their_loads_are_even():
    layer, x = layer_of(k=1), torch.randn(301, D)
    layer.router.scorer.weight.data[2] *= 4
    with record(layer) as tape:
        layer(x)
    counts = tape[0].routing.counts().tolist()
    numbers = [1] * E
    for _ in range(4):
        loads = [count / number for count, number in zip(counts, numbers, strict=True)]
        numbers[loads.index(max(loads))] += 1
    many = replicate(layer, 4, evidence=tape)
    assert [len(many.places(e)) for e in range(E)] == numbers
    routing = many.router(x)
    places = many.placement(routing).indices
    for e in range(E):
        loads = [int((places == place).sum()) for place in many.places(e)]
        assert sum(loads) == counts[e]
        assert max(loads) - min(loads) <= 1


def test_greedy_is_best_for_the_busiest_slot():
    """No other way to add the places makes the largest load a place smaller."""
    counts = torch.randint(0, 100, (3,), generator=generator(1))
    best = min(
        max(int(c) / (1 + n) for c, n in zip(counts, added, strict=True))
        for added in [(a, b, 4 - a - b) for a in range(5) for b in range(5 - a)]
    )
    numbers = replicas_by_load(counts, [1, 1, 1], 4)
    assert sum(numbers) == 7
    assert max(int(c) / n for c, n in zip(counts, numbers, strict=True)) == pytest.approx(best)


def test_replicas_are_parameters_of_their_own(tmp_path):
    layer, x = layer_of().eval(), torch.randn(40, D)
    many = replicate(layer, [3, 1, 1, 1, 1])
    first, *others = many.places(0)
    for place in others:
        assert torch.equal(many.experts.up[place], many.experts.up[first])
    many.experts.down.data[others[0]].mul_(1.01)  # quantised, say
    save(many, tmp_path)
    assert torch.equal(load(tmp_path)(x), many(x))
    many(x).sum().backward()
    assert all(bool(many.experts.up.grad[place].any()) for place in many.places(0))


def test_mistakes_are_named(user_error):
    layer = layer_of()
    for copies, words in (
        ([1, 1], ["E=5", "2 numbers"]),
        ([0, 1, 1, 1, 1], ["places of expert 0", "from 1", "got 0"]),
        ([1, 1.5, 1, 1, 1], ["places of expert 1", "got 1.5"]),
        (-1, ["added", "got -1"]),
        (2, ["no evidence"]),
        ({"x": 2}, ["unknown layer of replicate", "'x'"]),
    ):
        with user_error(*words):
            replicate(layer, copies)
    with record(layer) as tape:
        layer(torch.randn(9, D))
    with user_error("replicate", "another model"):
        replicate(layer_of(), 2, evidence=tape)
    zero = layer_of(placement=Placement([[0], [1], [2], [3], []]))
    with user_error("places of expert 4", "from 0 to 0", "got 2"):
        replicate(zero, [1, 1, 1, 1, 2])
    assert replicate(zero, [1, 2, 1, 1, 0]).places(4) == []

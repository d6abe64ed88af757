"""Complexity balance against its equation, and where its minimum lies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from spectralmoe import FeedForward, LinearScorer, MoE, Router, Routing, Soft, TopK, record
from spectralmoe.experts import HeterogeneousExperts
from spectralmoe.regularizers import complexity_balance, importance_cv2

D, E, N = 5, 4, 12
COSTS = [1.0, 2.0, 4.0, 8.0]


def layer_of(selector=None, bank=None):
    return MoE(Router(LinearScorer(D, E), selector or TopK(1)), bank or FeedForward(E, D, 4)).double()


def slow(logits, mask, k, costs, load):
    """The equation, one number at a time."""
    real = [t for t in range(len(logits)) if mask is None or mask[t]]
    probs = logits.softmax(-1)
    values = [[sum(probs[t, e] for t in real) / len(real) * costs[e] / max(costs) for e in range(E)]]
    if load:
        clear = [[] for _ in range(E)]
        for t in real:
            for e in range(E):
                others = sorted((logits[t, i] for i in range(E) if i != e), reverse=True)
                clear[e].append((1 + torch.erf(E * (logits[t, e] - others[k - 1]) / math.sqrt(2))) / 2)
        values.append([sum(each) / len(real) for each in clear])
    squares = []
    for row in values:
        mean = sum(row) / E
        squares.append(sum((value - mean) ** 2 for value in row) / E / mean**2)
    return sum(squares) / len(squares)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("load", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_equation(k, load, masked, same):
    layer = layer_of(TopK(k))
    x, mask = torch.randn(N, D, dtype=torch.float64, requires_grad=True), torch.arange(N) % 3 > 0 if masked else None
    with record(layer) as tape:
        layer(x, mask=mask)
    logits = tape[0].routing.logits
    value = complexity_balance(tape[0], COSTS, load=load)
    same(value, slow(logits, mask, k, COSTS, load), [x, layer.router.scorer.weight])


def test_equal_costs_are_the_importance_alone(close):
    layer = layer_of()
    with record(layer) as tape:
        layer(torch.randn(N, D, dtype=torch.float64))
    close(complexity_balance(tape[0], [3.0] * E, load=False), importance_cv2(tape[0]))
    assert complexity_balance(tape[0], load=False) == importance_cv2(tape[0])  # of a bank of equal experts


def test_its_minimum_lies_at_shares_in_inverse_proportion_to_the_costs(close):
    logits = torch.zeros(1, E, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS([logits], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        descent.zero_grad()
        value = complexity_balance(Routing(logits, logits[:, :1], torch.zeros(1, 1).long()), COSTS, load=False)
        value.backward()
        return value

    descent.step(closure)
    assert closure() < 1e-8
    assert logits.softmax(-1)[0].tolist() == pytest.approx([8 / 15, 4 / 15, 2 / 15, 1 / 15], abs=1e-3)


def test_the_bank_says_the_costs_where_none_are_given(close):
    bank = HeterogeneousExperts([nn.Linear(D, D) for _ in COSTS], costs=COSTS)
    layer = layer_of(bank=bank)
    with record(layer) as tape:
        layer(torch.randn(N, D, dtype=torch.float64))
    assert complexity_balance(tape[0]) == complexity_balance(tape[0], COSTS)


def test_where_all_experts_run_the_load_says_nothing(close):
    layer = layer_of(Soft())
    with record(layer) as tape:
        layer(torch.randn(N, D, dtype=torch.float64))
    close(complexity_balance(tape[0], COSTS), complexity_balance(tape[0], COSTS, load=False) / 2)


def test_misuse(user_error):
    routing = Router(LinearScorer(D, E), TopK(1))(torch.randn(N, D))
    with user_error("complexity_balance", "costs are missing"):
        complexity_balance(routing)
    for costs in ([1.0, 2.0], [1.0, 2.0, 3.0, 0.0]):
        with user_error("complexity_balance", "one positive number", "E=4"):
            complexity_balance(routing, costs)

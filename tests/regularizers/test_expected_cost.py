"""Expected cost against its sum, and where it is the cost of what was chosen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
from spectralmoe.experts import HeterogeneousExperts
from spectralmoe.regularizers import complexity_balance, expected_cost

D, E, N = 5, 4, 12
COSTS = [1.0, 2.0, 4.0, 8.0]


def recorded(x, mask=None, bank=None):
    layer = MoE(Router(LinearScorer(D, E), TopK(1)), bank or FeedForward(E, D, 4)).double()
    with record(layer) as tape:
        layer(x, mask=mask)
    return tape[0], layer


@pytest.mark.parametrize("masked", [False, True])
def test_equation(masked, same):
    x, mask = torch.randn(N, D, dtype=torch.float64, requires_grad=True), torch.arange(N) % 3 > 0 if masked else None
    item, layer = recorded(x, mask)
    probs = item.routing.logits.softmax(-1)
    real = [t for t in range(N) if mask is None or mask[t]]
    slow = sum(probs[t, e] * COSTS[e] / 8 for t in real for e in range(E)) / len(real)
    same(expected_cost(item, COSTS), slow, [x, layer.router.scorer.weight])


def test_of_sure_choices_it_is_the_cost_of_what_was_chosen():
    logits = 100 * nn.functional.one_hot(torch.tensor([0, 3, 1, 3]), E).double()
    router = Router(LinearScorer(E, E), TopK(1)).double()
    router.scorer.weight.data = torch.eye(E, dtype=torch.float64)
    routing = router(logits)
    assert expected_cost(routing, COSTS).item() == pytest.approx((1 + 8 + 2 + 8) / 4 / 8)
    assert expected_cost(routing, [3.0] * E).item() == pytest.approx(1)


def test_costs_are_those_of_the_bank_and_descent_buys_what_is_cheap():
    modules = [nn.Sequential(nn.Linear(D, h), nn.Linear(h, D)) for h in (2, 4, 8, 16)]
    x = torch.randn(N, D, dtype=torch.float64)
    item, layer = recorded(x, bank=HeterogeneousExperts(modules))
    value = expected_cost(item)
    assert value.item() == pytest.approx(expected_cost(item, COSTS).item())
    value.backward()
    layer.router.scorer.weight.data -= 0.01 * layer.router.scorer.weight.grad
    assert expected_cost(layer.router(x), COSTS) < value


def test_no_tokens_cost_nothing():
    item, _ = recorded(torch.zeros(0, D, dtype=torch.float64))
    assert expected_cost(item, COSTS).item() == 0


def test_mistakes_are_named(user_error):
    item, _ = recorded(torch.randn(N, D, dtype=torch.float64))
    for costs in ([1.0, 2.0], [1.0, 2.0, 0.0, 1.0], [1.0, 2.0, float("inf"), 1.0]):
        with user_error("expected_cost: costs must be one positive number for each of E=4 experts"):
            expected_cost(item, costs)
    with user_error("expected_cost: costs are missing"):
        expected_cost(item.routing)


def test_zero_experts_cost_nothing(user_error):
    layer = MoE(Router(LinearScorer(D, E + 2), TopK(2)), FeedForward(E, D, 4))
    with record(layer) as tape:
        layer(torch.randn(N, D))
    share = tape[0].routing.probs[:, :E].sum(1).mean()
    torch.testing.assert_close(expected_cost(tape[0]), share)
    with user_error("complexity_balance", "zero experts"):
        complexity_balance(tape[0])

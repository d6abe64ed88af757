"""Score variance against its equation, one token and one expert at a time."""

from __future__ import annotations

import pytest
import torch

from spectralmoe import FeedForward, LinearScorer, MoE, Router, Soft, TopK, TopP, feed, record
from spectralmoe.regularizers import score_variance
from spectralmoe.routing import Routing

D, E, N = 6, 4, 20
both = pytest.mark.parametrize("over", ["tokens", "experts"])


def slow(routing, over):
    """The equation in float64."""
    real = [t for t in range(N) if routing.mask is None or routing.mask[t]]
    rows = []
    for t in real:
        p, chosen = routing.logits[t].softmax(0), routing.indices[t].tolist()
        rows.append([p[j] if j in chosen else torch.zeros((), dtype=torch.float64) for j in range(E)])
    total = 0
    for row in rows:
        for j, s in enumerate(row):
            mean = sum(other[j] for other in rows) / len(rows) if over == "tokens" else sum(row) / E
            total = total + (s - mean) ** 2 / E
    return -total / len(rows)


@both
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("selector", [TopK(2), TopP(0.6), Soft()], ids=["topk", "top_p", "soft"])
def test_equation(over, masked, selector, same):
    router, x = Router(LinearScorer(D, E), selector).double(), torch.randn(N, D, dtype=torch.float64)
    routing = router(x, mask=torch.arange(N) % 3 > 0 if masked else None)
    same(score_variance(routing, over=over), slow(routing, over), router.parameters())


def test_by_hand(close):
    """Two tokens, each sure of an expert of its own: deviations of 1/2 from both means."""
    routing = Routing(200 * torch.eye(2), torch.ones(2, 1), torch.tensor([[0], [1]]))
    close(score_variance(routing), -0.25)
    close(score_variance(routing, over="experts"), -0.25)


def test_constant_routing_varies_over_experts_alone(close):
    routing = Router(LinearScorer(D, E), TopK(2))(torch.randn(1, D).expand(N, D))
    close(score_variance(routing), 0.0)
    assert score_variance(routing, over="experts") < -1e-3


def test_without_a_real_token_it_is_zero():
    router = Router(LinearScorer(D, E), TopK(2))
    assert score_variance(router(torch.randn(3, D), mask=torch.zeros(3, dtype=torch.bool))) == 0
    assert score_variance(router(torch.randn(0, D))) == 0


def test_of_a_replayed_routing_it_is_the_routers_own_choice(close):
    layer, x = MoE(Router(LinearScorer(D, E), TopK(1)), FeedForward(E, D, 3)), torch.randn(N, D)
    with feed(layer, indices={"": torch.zeros(N, 1, dtype=torch.int64)}), record(layer) as tape:
        layer(x)
    close(score_variance(tape[0]), score_variance(layer.router(x)))


def test_misuse(user_error):
    with user_error("over of score_variance 'token'", "experts, tokens"):
        score_variance(Router(LinearScorer(D, E), TopK(2))(torch.randn(N, D)), over="token")

"""What a watch sees of a layer of this library: the tokens that its router read."""

from __future__ import annotations

import pytest
import torch

from spectralmoe import Capacity, ExpertChoice, FeedForward, LinearScorer, MoE, Router, TopK, TopP
from spectralmoe.diagnostics.watch import watch
from spectralmoe.experts import ConvExperts
from spectralmoe.selectors import ClusterDropout
from spectralmoe.units import Sample

N, D, E = 20, 6, 3


def test_tokens_are_those_of_the_router_with_or_without_an_expert():
    layer = MoE(Router(LinearScorer(D, E), Capacity(TopK(1), 0.3)), FeedForward(E, D, 8))
    x, mask = torch.randn(N, D), torch.arange(N) % 5 > 0
    with watch(layer) as seen, torch.autocast("cpu"):
        layer(x.masked_fill(~mask[:, None], torch.nan), mask=mask)
    (call,) = seen.drain()
    assert int((call.routing.indices < 0).sum()) > int((~mask).sum())
    assert torch.equal(call.tokens, x.masked_fill(~mask[:, None], 0))
    assert not call.tokens.requires_grad


def test_there_are_none_where_nobody_asks_or_experts_read_something_else():
    layer = MoE(Router(LinearScorer(D, E), TopK(1)), FeedForward(E, D, 8))
    images = MoE(Router(LinearScorer(D, E), TopK(1)), ConvExperts(E, D, 4), unit=Sample())
    for model, x, asked in [(layer, torch.randn(N, D), False), (images, torch.randn(N, D, 3, 3), True)]:
        with watch(model, tokens=asked) as seen:
            model(x)
        assert seen.drain()[0].tokens.shape == (0, D)


@pytest.mark.parametrize(
    ("selector", "k"),
    [(TopK(2), 2), (ClusterDropout(TopK(2), 1, rate=0.3), 2), (Capacity(TopK(2), 1.5), 2), (TopP(0.5), None)],
    ids=["plain", "dropout", "capacity", "varies"],
)
def test_k_is_that_of_the_selector_inside(selector, k):
    with watch(MoE(Router(LinearScorer(D, E), selector), FeedForward(E, D, 8))) as seen:
        assert [layer.top_k for layer in seen.layers] == [k]


@pytest.mark.parametrize(
    "selector", [TopK(1), ExpertChoice(2.0), Capacity(TopK(1), factor=1.0), ClusterDropout(TopK(1), 1)]
)
def test_a_layer_is_routed_again_where_each_token_decides_alone(selector):
    """64 tokens that like expert 0 more and more, of which the first 8 are routed again by themselves."""
    layer = MoE(Router(LinearScorer(1, 4), selector), FeedForward(4, 1, 8)).eval()
    with torch.no_grad():
        layer.router.scorer.weight.copy_(torch.tensor([[1.0], [0.0], [-1.0], [-2.0]]))
    tokens = torch.linspace(0.1, 3, 64)[:, None]
    with watch(layer) as seen:
        layer(tokens)
        (call,) = seen.drain()
    again = call.layer.route(call.tokens[:8])
    assert call.layer.reroutes == selector.per_token
    assert call.layer.reroutes == torch.equal(again.members(), call.routing.members()[:8])

"""Unweighted: the choice of another selector, weight 1 for each chosen expert, and the gradient of the router."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectralmoe import Capacity, FeedForward, LinearScorer, MoE, Router, TopK
from spectralmoe.experts import ConfidentExperts
from spectralmoe.selectors import Balanced, ClusterDropout, Soft, Unweighted

D, E, N = 6, 4, 11


@pytest.mark.parametrize("inner", [lambda: TopK(2), lambda: Balanced(2), lambda: Capacity(TopK(2), 0.5)])
@pytest.mark.parametrize("router_grad", ["none", "confidence"])
def test_the_choice_of_another_with_the_weight_1(inner, router_grad):
    scorer, x = LinearScorer(D, E), torch.randn(N, D)
    mask = torch.arange(N) > 2
    plain, routing = (
        Router(scorer, selector)(x, mask=mask) for selector in (inner(), Unweighted(inner(), router_grad=router_grad))
    )
    assert torch.equal(routing.indices, plain.indices)
    assert torch.equal(routing.weights, (plain.indices >= 0).float())
    assert routing.weights.requires_grad == (router_grad == "confidence")


@pytest.mark.parametrize("router_grad", ["none", "confidence"])
@pytest.mark.parametrize("around", [lambda s: s, lambda s: Capacity(s, 2.0)], ids=["alone", "in a capacity"])
def test_a_replayed_expert_that_is_left_out_has_no_weight(router_grad, around):
    inner = ClusterDropout(ClusterDropout(TopK(1), 1), 2, rate=0.0)
    router = Router(LinearScorer(D, E), around(Unweighted(inner, router_grad=router_grad)))
    weights = router(torch.randn(E, D), replay=torch.arange(E)[:, None]).weights[:, 0]
    assert torch.equal(weights, inner.selector.taking_part.float())
    assert sorted(weights.tolist()) == [0, 0, 1, 1]


@pytest.mark.parametrize("router_grad", ["none", "confidence"])
def test_the_logit_of_a_chosen_expert_gets_the_gradient_of_its_log_confidence(router_grad, close):
    bank = ConfidentExperts(FeedForward(E, D, 8))
    nn.init.normal_(bank.direction)
    layer = MoE(Router(LinearScorer(D, E), Unweighted(TopK(2), router_grad=router_grad)), bank).double()
    x, probe = torch.randn(N, D, dtype=torch.float64), torch.randn(N, D, dtype=torch.float64)
    routing, want, y = layer.router(x), torch.zeros(E, D, dtype=torch.float64), []
    for t in range(N):
        outputs = [bank.expert(x[t : t + 1], e)[0] for e in routing.indices[t].tolist()]  # c F(x)
        y.append(sum(outputs))
        for e, output in zip(routing.indices[t].tolist(), outputs, strict=True):
            want[e] += (probe[t] @ output).detach() * x[t]  # d (s_e) / d W_e = x
    got = layer(x)
    close(got, torch.stack(y))
    (got * probe).sum().backward()
    grad = layer.router.scorer.weight.grad
    if router_grad == "none":
        assert grad is None
    else:
        close(grad, want)


def test_what_it_refuses(user_error):
    with user_error("'all'", "none", "confidence"):
        Unweighted(TopK(2), router_grad="all")
    with user_error("Unweighted", "soft"):
        Router(LinearScorer(D, E), Unweighted(Soft()))

"""Cluster variance against its equation, one token and one expert at a time, and what the groups mean."""

from __future__ import annotations

import math

import pytest
import torch

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
from spectralmoe.regularizers import cluster_variance
from spectralmoe.selectors import Capacity, ClusterDropout

D, E, N = 5, 8, 20
forms = pytest.mark.parametrize("form", [0, 1, 2])


def routed(*shares, selector=None):
    """The routing of equal tokens whose scores are ``shares``."""
    router = Router(LinearScorer(1, len(shares)), selector or TopK(1))
    router.scorer.weight.data = torch.tensor(shares).log()[:, None]
    return router(torch.ones(3, 1))


def slow(scores, mask, groups, form, part=range(E)):
    """The equation in float64, one number at a time."""
    real = [t for t in range(len(scores)) if mask is None or mask[t]]
    means = [sum(scores[t, e] for t in real) / len(real) for e in range(E)]
    size = E // (groups if form else 1)
    variances, centres = [], []
    for first in range(0, E, size):
        inside = [means[e] for e in range(first, first + size) if e in part]
        centres.append(sum(inside) / len(inside))
        variances.append(sum((p - centres[-1]) ** 2 for p in inside) / len(inside))
    value = sum(variances) / len(variances)
    if form < 2:
        return value
    largest, second = sorted(centres, reverse=True)[:2]
    return value / (largest - second).exp()


@forms
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("groups", [2, 4])
def test_equation(form, masked, groups, same):
    layer = MoE(Router(LinearScorer(D, E), TopK(2)), FeedForward(E, D, 4)).double()
    x, mask = torch.randn(N, D, dtype=torch.float64, requires_grad=True), torch.arange(N) % 3 > 0 if masked else None
    with record(layer) as tape:
        layer(x, mask=mask)
    value = cluster_variance(tape[0], groups=groups, form=form)
    want = slow(tape[0].routing.scores, mask, groups, form)
    same(value, want, [x, layer.router.scorer.weight])
    assert value == cluster_variance(tape[0].routing, groups=groups, form=form)


def test_by_hand(close):
    """Means 1/2, 1/4 and 1/8, 1/8: the groups' are 3/8 and 1/8."""
    routing = routed(4.0, 2.0, 1.0, 1.0)
    close(cluster_variance(routing, groups=2, form=0), 6 / 256)
    close(cluster_variance(routing, groups=2), 1 / 128)
    close(cluster_variance(routing, groups=2, form=2), math.exp(-1 / 4) / 128)


def test_even_scores_have_none_and_so_have_even_siblings():
    for form in (0, 1, 2):
        assert cluster_variance(routed(*[1.0] * 8), groups=2, form=form) == 0
    uneven = routed(2.0, 2.0, 1.0, 1.0)
    assert cluster_variance(uneven, groups=2) == 0 < cluster_variance(uneven, groups=2, form=0)


@forms
def test_the_order_of_siblings_and_of_groups_does_not_matter(form, close):
    value = cluster_variance(routed(4.0, 2.0, 1.0, 3.0, 1.0, 5.0), groups=2, form=form)
    close(cluster_variance(routed(1.0, 4.0, 2.0, 5.0, 3.0, 1.0), groups=2, form=form), value)
    close(cluster_variance(routed(3.0, 1.0, 5.0, 4.0, 2.0, 1.0), groups=2, form=form), value)
    other = cluster_variance(routed(4.0, 5.0, 1.0, 3.0, 1.0, 2.0), groups=2, form=form)
    assert bool(torch.isclose(other, value)) == (form == 0)


def test_the_variance_of_all_is_that_inside_groups_and_that_of_their_means(close):
    scores = torch.rand(12) + 0.1
    routing, centres = routed(*scores.tolist()), (scores / scores.sum()).view(3, 4).mean(-1)
    inside, whole = (cluster_variance(routing, groups=3, form=form) for form in (1, 0))
    assert whole > inside > cluster_variance(routing, groups=3, form=2) > 0
    close(whole, inside + centres.var(unbiased=False))


@forms
@pytest.mark.parametrize("wrap", [lambda selector: selector, lambda selector: Capacity(selector, 9.0)])
def test_experts_that_are_left_out_have_no_part_in_it(form, wrap, same):
    layer = MoE(Router(LinearScorer(D, E), wrap(ClusterDropout(TopK(1), 2))), FeedForward(E, D, 4)).double()
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    for training in (True, False):
        with record(layer.train(training)) as tape:
            layer(x)
        on = next(m for m in layer.modules() if isinstance(m, ClusterDropout)).taking_part
        part = on.nonzero().flatten().tolist() if training else range(E)
        same(cluster_variance(tape[0], groups=2, form=form), slow(tape[0].routing.scores, None, 2, form, part), [x])


def test_without_a_real_token_it_is_zero():
    router = Router(LinearScorer(D, E), TopK(1))
    assert cluster_variance(router(torch.randn(0, D)), groups=2) == 0
    assert cluster_variance(router(torch.randn(3, D), mask=torch.zeros(3, dtype=torch.bool)), groups=2) == 0


def test_misuse(user_error):
    routing = routed(*[1.0] * 6)
    for groups in (4, 0, 12, 2.0):
        with user_error("cluster_variance", f"groups={groups}", "E=6"):
            cluster_variance(routing, groups=groups)
    with user_error("groups=6", "one each"):
        cluster_variance(routing, groups=6)
    assert cluster_variance(routing, groups=6, form=0) < 1e-12
    with user_error("form=2", "groups=1", "form=1"):
        cluster_variance(routing, groups=1, form=2)
    with user_error("form of cluster_variance '3'", "0, 1, 2"):
        cluster_variance(routing, groups=2, form=3)

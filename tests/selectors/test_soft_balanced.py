"""Soft routing with a load bias: the weights are the biased softmax, the bias follows the load."""

import math

import pytest
import torch
from seeds import shifted

from spectralmoe import FeedForward, LinearScorer, MoE, Router, Soft, SoftBalanced, UserError, after_step, record


def bound(experts=4, **arguments):
    selector = SoftBalanced(**arguments)
    selector.bind(experts)
    return selector


def test_the_weights_are_the_softmax_of_logits_and_bias(same):
    selector = bound()
    selector.bias.copy_(torch.tensor([0.5, -1.0, 0.0, 2.0]))
    logits = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    indices = selector.choose(logits.detach())
    found = selector.weigh(logits, indices)
    for row, values in zip(found.tolist(), logits.tolist(), strict=True):
        biased = [math.exp(v + b) for v, b in zip(values, (0.5, -1.0, 0.0, 2.0), strict=True)]
        assert row == pytest.approx([v / sum(biased) for v in biased])
    same(found, (logits + selector.bias.double()).softmax(-1), [logits])


def test_without_a_bias_it_is_soft_routing():
    selector, logits = bound(), torch.randn(5, 4)
    plain = Soft()
    assert selector.soft
    assert torch.equal(selector.weigh(logits, selector.choose(logits)), plain.weigh(logits, plain.choose(logits)))


@pytest.mark.parametrize("counts", [[10, 0, 0, 0], [1, 2, 3, 4], [5, 5, 5, 5], [0, 0, 0, 0]])
def test_update_by_hand(counts):
    selector = bound(rate=0.3, memory=0.2)
    load, bias = [0.25] * 4, [0.0] * 4
    for _ in range(3):
        selector.update(torch.tensor(counts))
        if sum(counts):
            load = [f + 0.2 * (c / sum(counts) - f) for f, c in zip(load, counts, strict=True)]
            bias = [b + 0.3 * min(max(1 - 4 * f, -1), 1) for b, f in zip(bias, load, strict=True)]
    assert selector.load.tolist() == pytest.approx(load)
    assert selector.bias.tolist() == pytest.approx(bias)


def test_after_step_moves_the_bias_by_the_load_and_evens_it():
    torch.manual_seed(shifted(0))
    layer = MoE(Router(LinearScorer(6, 4), SoftBalanced(rate=0.1, memory=0.5)), FeedForward(4, 6, 8))
    layer.router.scorer.weight.data[0] += 3
    x = torch.randn(400, 6).abs()
    loads = []
    for _ in range(150):
        with record(layer) as tape:
            layer(x)
        loads.append(tape[0].routing.load())
        after_step(layer, tape)
    assert float(loads[0].max()) > 0.9
    assert float(loads[-1].min()) > 0.15


def test_two_routers_may_not_share_one():
    selector = bound()
    with pytest.raises(UserError, match="belongs to another router"):
        selector.bind(4)


@pytest.mark.parametrize("arguments", [{"rate": -1.0}, {"memory": 0.0}, {"memory": 1.5}])
def test_arguments(arguments):
    with pytest.raises(UserError, match="SoftBalanced: rate"):
        SoftBalanced(**arguments)

"""Collapse, balance over what, and routers of one expert a token.

Threads: torchtitan #1246; minimind #858; st-moe-pytorch #3; Megatron-LM #1498.
"""

from __future__ import annotations

import pytest
import torch
from seeds import shifted

from spectralmoe import Balanced, Capacity, NoisyTopK, Term, TopK, TopP, after_step, penalty, record
from spectralmoe.diagnostics import max_vio
from spectralmoe.selectors import SELECTORS, ClusterDropout, GroupLimited, Threshold

ONE_EXPERT = {
    "topk": lambda **more: TopK(1, **more),
    "noisy_topk": lambda **more: NoisyTopK(1, **more),
    "balanced": lambda normalize=False: Balanced(1, normalize=normalize),
    "topp": lambda **more: TopP(0.5, max_k=1, **more),
    "threshold": lambda normalize=False, **more: Threshold(1, 0.1, normalize=normalize, score="softmax", **more),
    "capacity": lambda **more: Capacity(TopK(1, **more), 2.0),
    "cluster_dropout": lambda **more: ClusterDropout(TopK(1, **more), 1),
    "group_limited": lambda **more: GroupLimited(TopK(1, **more), 2, 1),
}
of_one_expert = pytest.mark.parametrize("selector", ONE_EXPERT.values(), ids=ONE_EXPERT)


def test_torchtitan_1246_a_collapsed_router_is_brought_back(chooser):
    """torchtitan #1246: A training loop sent all tokens of a sequence to one expert, and nothing pulled them apart
    again.

    Here the selection bias spreads a router that puts nearly every token on expert 0.
    """
    layer, x = chooser(Balanced(1, score="softmax", normalize=False, rate=0.003)), torch.randn(400, 16)
    x[:, 0] += 3
    loads = []
    for _ in range(300):
        with record(layer) as tape:
            layer(x)
        loads.append(max_vio(tape[0].routing.load()))
        after_step(layer, tape)
    assert loads[0] > 2.5
    assert max(loads[-20:]) < 0.3


@of_one_expert
def test_minimind_858_a_router_of_one_expert_a_token_is_trained(chooser, selector, gradients):
    """minimind #858: Weights renormalised over a single expert are the constant 1: the router's gradient was 7e-10, and
    the large MoE ended worse than the small dense model.

    Here the weight is the score itself, and its gradient is as large as with two experts a token.
    """
    x, sizes = torch.randn(60, 16), []
    for one in (selector(), TopK(2)):
        torch.manual_seed(shifted(5))
        layer = chooser(one)
        (grad,) = gradients(layer(x).square().mean(), [layer.router.scorer.weight])
        sizes.append(float(grad.norm()))
    assert sizes[0] > 0.1 * sizes[1] > 0


@of_one_expert
def test_minimind_858_the_constant_weight_is_refused(selector, user_error):
    """minimind #858: What would bring the fault about is an error when the layer is made, with the cure."""
    with user_error("k=1 with normalize=True", "the router gets no gradient", "normalize=False"):
        selector(normalize=True)


@of_one_expert
def test_st_moe_3_one_expert_a_token_is_no_special_case(chooser, selector, close):
    """st-moe-pytorch #3: One expert a token was refused: the gate only took two or more.

    Here the output is that of the chosen expert times its weight.
    """
    layer, x = chooser(selector()).eval(), torch.randn(30, 16)
    with record(layer) as tape:
        y = layer(x)
    routing = tape[0].routing
    want = [layer.experts.expert(x[t : t + 1], int(e)) for t, e in enumerate(routing.indices[:, 0])]
    close(y, torch.cat(want) * routing.weights)


def test_st_moe_3_every_selector_with_a_k_is_among_these():
    """st-moe-pytorch #3: The tests above take every selector that has a number of experts a token, but the one whose
    weights are 1 by its definition (tests/selectors/test_unweighted.py).
    """
    assert {*ONE_EXPERT} | {"expert_choice", "soft", "soft_balanced", "entmax", "unweighted"} == {*SELECTORS}


def test_megatron_1498_balance_over_the_global_batch(chooser, tokens_for):
    """Megatron-LM #1498: Balance within every micro-batch keeps experts from taking a subject of their own, since a
    micro-batch may hold one subject alone; users asked for counts over the global batch.

    Here four micro-batches that each use one expert are even together: the selection bias does not move, though each
    alone would move it. Counts over ranks are in ``test_distributed.py``.
    """
    joined, alone = (chooser(Balanced(1, normalize=False, rate=0.1)) for _ in range(2))
    tapes = []
    for expert in range(4):
        with record(joined) as tape:
            joined(tokens_for([expert] * 20))
        tapes.append(tape)
    after_step(joined, *tapes)
    assert not joined.router.selector.bias.any()
    with record(alone) as tape:
        alone(tokens_for([3] * 20))
    after_step(alone, tape)
    assert alone.router.selector.bias.tolist() == pytest.approx([0.1, 0.1, 0.1, -0.1])


def test_megatron_1498_a_loss_over_the_global_batch(chooser, tokens_for):
    """Megatron-LM #1498: The same for a loss: a term over all calls of a layer sees their common load."""

    def pooled_balance(records):
        routings = [item.routing for item in records]
        counts = torch.stack([routing.counts() for routing in routings]).sum(0)
        return 4 * (counts / counts.sum() * torch.cat([routing.probs for routing in routings]).mean(0)).sum()

    layer = chooser(TopK(1))
    with record(layer) as tape:
        for expert in range(4):
            layer(tokens_for([expert] * 20, logit=20.0))
    term = Term(pooled_balance, 1.0, scope="model")
    assert penalty(tape, {"balance": term})[0].item() == pytest.approx(1, abs=1e-3)
    with record(layer) as tape:
        layer(tokens_for([1] * 20, logit=20.0))
    assert penalty(tape, {"balance": term})[0].item() == pytest.approx(4, abs=1e-3)

"""Precision of scores, counters and biases.

Threads: megablocks #91; Megatron-LM #1482, #7081.
"""

from __future__ import annotations

import copy

import pytest
import torch

from spectralmoe import Balanced, SoftBalanced, TopK, after_step, record


@pytest.mark.parametrize("how", ["cast", "half", "autocast"])
def test_megablocks_91_the_router_alone_stays_in_full_precision(make_net, how):
    """megablocks #91: There was no way to run the router in fp32 and the rest in bf16.

    Here it is the rule: a cast or autocast reaches the experts, the router's parameters, logits and weights stay fp32,
    and its choice is the one that full precision makes of the same tokens.
    """
    net, x = make_net(), torch.randn(200, 16)
    dtype = torch.float16 if how == "half" else torch.bfloat16
    if how != "autocast":
        net, x = net.to(dtype), x.to(dtype)
    read = []
    net.blocks[1].moe.router.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.autocast("cpu", dtype=dtype, enabled=how == "autocast"), record(net, keep=("hidden",)) as tape:
        net(x)
    for item in tape:
        assert item.hidden.dtype == dtype
        assert all(p.dtype == torch.float32 for p in item.router.parameters())
        assert item.routing.logits.dtype == item.routing.weights.dtype == torch.float32
    matrix = net.blocks[1].moe.router.scorer.weight.double()
    assert torch.equal(tape[1].routing.indices, (read[0].double() @ matrix.T).topk(2).indices)


@pytest.mark.parametrize("cast", [lambda net: net.bfloat16(), lambda net: net.half(), copy.deepcopy])
def test_megatron_1482_a_small_step_of_the_bias_is_not_rounded_away(make_net, cast):
    """Megatron-LM #1482: The selection bias became bf16 with the model, where 1 + 0.001 is 1: it stopped moving.

    Here it stays fp32, and 50 steps of 0.001 add up.
    """
    net = cast(make_net(lambda: Balanced(1, normalize=False, rate=0.001), depth=1))
    selector = net.blocks[0].moe.router.selector
    selector.bias.fill_(1.0)
    for _ in range(50):
        selector.update(torch.tensor([9, 1, 1, 1]))
    assert selector.bias.dtype == torch.float32
    assert selector.bias.tolist() == pytest.approx([0.95, 1.05, 1.05, 1.05], abs=1e-4)


def test_megatron_7081_counts_are_exact(make_net, close):
    """Megatron-LM #7081: Counts lived in a float buffer; cast to bf16 it held no integer above 256 exactly, and the
    sign of the bias update flipped.

    Here counts are int64 whatever the model's precision: a lead of one slot in 100 million decides the sign.
    """
    net, x = make_net(lambda: TopK(1), depth=1).bfloat16(), torch.randn(5000, 16).bfloat16()
    with record(net) as tape:
        net(x)
    routing = tape[0].routing
    assert routing.counts().dtype == torch.int64
    assert routing.counts().tolist() == [(routing.indices == e).sum().item() for e in range(4)]
    many = 10**8
    balanced, soft = Balanced(1, normalize=False, rate=1.0), SoftBalanced(rate=1.0, memory=1.0)
    for selector in (balanced, soft):
        selector.bind(4)
    balanced.update(torch.tensor([many + 1, many, many, many]))
    assert balanced.bias.tolist() == [-1, 1, 1, 1]
    soft.update(torch.tensor([3 * many, many, many, many]))
    close(soft.bias, [-1.0, 1 / 3, 1 / 3, 1 / 3])


def test_megatron_7081_after_a_thousand_small_batches(make_net):
    """Megatron-LM #7081: The same through the public way: one token at a time, a thousand times, in a bf16 model."""
    net = make_net(lambda: Balanced(1, normalize=False, rate=1.0), depth=1).bfloat16()
    x, tapes = torch.randn(1000, 16).bfloat16(), []
    with torch.no_grad():
        for token in x.split(1):
            with record(net) as tape:
                net(token)
            tapes.append(tape)
        with record(net) as whole:
            net(x)
    after_step(net, *tapes)
    counts = whole[0].routing.counts()
    assert counts.sum() == 1000
    assert torch.equal(net.blocks[0].moe.router.selector.bias, (250 - counts).sign().float())

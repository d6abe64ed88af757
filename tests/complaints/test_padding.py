"""Pad tokens are nobody's load.

Threads: Megatron-LM #1984, #2121; torchtitan #4594.
"""

from __future__ import annotations

import pytest
import torch
from seeds import shifted

from spectralmoe import Balanced, FeedForward, MoE, Term, after_step, feed, penalty, record
from spectralmoe.regularizers import importance_cv2, load_balance, router_z, spectral_norm

TERMS = {
    "balance": Term(load_balance, 0.5),
    "z": Term(router_z, 0.1),
    "importance": Term(importance_cv2, 0.2),
    "gates": Term(lambda item: spectral_norm(item, matrix="gates", form="square"), 0.3),
}


@pytest.fixture
def padded():
    """Tokens (2, 20, 12) of which 9 at the ends are nan, and the mask."""
    x, mask = torch.randn(2, 20, 12), torch.ones(2, 20, dtype=torch.bool)
    mask[0, 15:] = mask[1, 16:] = False
    return x.masked_fill(~mask[..., None], torch.nan), mask


def test_megatron_1984_and_2121_losses_see_real_tokens_alone(make_router, selector_name, padded, close):
    """Megatron-LM #1984, Megatron-LM #2121: Pad tokens, all alike, counted in the balance loss: it pulled the router
    towards spreading the padding.

    Here every loss, count, weight and gradient is that of the real tokens without the padding, for every selector, even
    where the padding holds nan.
    """
    layer, (x, mask) = MoE(make_router("linear", selector_name), FeedForward(6, 12, 8)).eval(), padded
    found = []
    for tokens, own in ((x, mask), (x[mask], None)):
        layer.zero_grad()
        with record(layer) as tape:
            y = layer(tokens, mask=own)
        total, parts = penalty(tape, TERMS)
        real = y if own is None else y[own]
        (real.square().sum() + total).backward()
        routing = tape[0].routing
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters()]
        found.append([real.detach(), routing.counts(), routing.load(), routing.dropped(), *parts.values(), *grads])
        if own is not None:
            assert not y[~own].any()
            assert (routing.indices[~own.flatten()] == -1).all()
    for one, two in zip(*found, strict=True):
        close(one.float(), two.float())


@pytest.mark.parametrize("fed", [False, True], ids=["passed", "fed"])
def test_torchtitan_4594_counts_see_real_tokens_alone(make_net, fed):
    """torchtitan #4594: Padding moved the selection bias: experts that padding likes looked busy.

    Here the bias after a step is that of the real tokens, also where the mask has to be fed past a model that does not
    pass it on.
    """
    x, mask = torch.randn(40, 16), torch.arange(40) < 11
    biases = []
    for tokens, own in ((x, mask), (x[mask], None)):
        net = make_net(lambda: Balanced(1, normalize=False, rate=0.1), depth=1)
        layer = net if fed else net.blocks[0].moe
        with record(net) as tape, feed(net, mask=own if fed else None):
            layer(tokens) if fed else layer(tokens, mask=own)
        after_step(net, tape)
        biases.append(net.blocks[0].moe.router.selector.bias)
    assert biases[0].any()
    assert torch.equal(*biases)


def test_torchtitan_4594_running_statistics_see_real_tokens_alone(make_router, padded, close):
    """torchtitan #4594: The same for a router that learns its axes from the tokens it sees."""
    x, mask = padded
    found = []
    for tokens, own in ((x, mask), (x[mask], None)):
        torch.manual_seed(shifted(2))
        layer = MoE(make_router("principal", "topk"), FeedForward(6, 12, 8)).train()
        with record(layer) as tape:
            layer(tokens, mask=own)
        after_step(layer, tape)
        found.append(layer.router.scorer)
    close(found[0].mean, found[1].mean)
    close(found[0].spread, found[1].spread)
    assert found[0].mean.any()

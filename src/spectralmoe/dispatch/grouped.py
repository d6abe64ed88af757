"""Sparse dispatch: sort the slots by expert, run each block once, gather back."""

from __future__ import annotations

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spectralmoe.dispatch.base import Dispatch, combine, sort_slots, spread
from spectralmoe.dispatch.dense import Dense
from spectralmoe.dispatch.fused import can_fuse, fused
from spectralmoe.experts import Experts
from spectralmoe.routing import Routing
from spectralmoe.torch_private import transforming

__all__ = ["Grouped"]


class Grouped(Dispatch):
    """Dropless: each expert runs on exactly the tokens that chose it, however uneven the load.

    On a device nothing waits for it where the router fills every slot, as ``TopK``, ``Balanced`` and ``NoisyTopK`` do
    without mask or capacity, and the bank keeps the loads there (``Experts.reads_loads``; feed-forward banks in bf16 of
    aligned widths do). Else the host waits once a forward, and never in a backward.

    Feed-forward banks on a CPU run as one operator (``dispatch.fused``). Inside the transforms of ``torch.func`` the
    dense form runs instead: it needs no number of rows on the host and no operator of our own.

    Args:
        recompute: keep nothing of the experts' work for the backward pass, which does it again as far as it needs it:
            less memory and more time. The router is not run again, so no choice can change.

    >>> import torch
    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK
    >>> layer = MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 32), dispatch=Grouped(recompute=True))
    >>> layer(torch.randn(10, 8)).sum().backward()
    """

    def __init__(self, recompute: bool = False) -> None:
        self.recompute = recompute

    def __call__(self, x: Tensor, routing: Routing, experts: Experts) -> Tensor:
        if transforming():
            return Dense()(x, routing, experts)
        if can_fuse(experts, x):
            return fused(x, routing, experts, recompute=self.recompute)
        slots = sort_slots(routing, experts.num_experts, on_host=experts.reads_loads(x))
        rows = spread(x, slots)
        if self.recompute:
            result = checkpoint(experts, rows, slots.counts, use_reentrant=False)
        else:
            result = experts(rows, slots.counts)
        return combine(result, routing.weights.to(x.dtype), slots)

"""Grouped dispatch: it sorts the slots by expert, runs each expert once on its tokens, and gathers the outputs."""

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
    """Runs each expert on exactly the tokens that chose it, however uneven the load; no token is dropped.

    On a GPU the CPU waits for the loads once a forward, and never in a backward. It does not wait at all if the router
    fills every slot (``TopK``, ``Balanced`` and ``NoisyTopK`` without mask or capacity) and the bank needs no loads on
    the CPU (``Experts.reads_loads``): that is so for feed-forward banks in bf16 whose widths are multiples of 8.

    Feed-forward banks on a CPU run as one operator (``dispatch.fused``). Inside the transforms of ``torch.func``
    ``Dense`` runs instead.

    Args:
        recompute: whether the backward pass runs the experts again instead of keeping their activations, which takes
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

"""Sparse dispatch: sort the slots by expert, run each block once, gather back."""

from __future__ import annotations

from torch import Tensor

from spectralmoe.dispatch.base import combine, sort_slots, spread
from spectralmoe.dispatch.fused import can_fuse, fused
from spectralmoe.experts import Experts
from spectralmoe.routing import Routing

__all__ = ["Grouped"]


class Grouped:
    """Dropless: each expert runs on exactly the tokens that chose it, however uneven the load.

    Feed-forward banks on a CPU run as one operator (``dispatch.fused``).
    """

    def __call__(self, x: Tensor, routing: Routing, experts: Experts) -> Tensor:
        if can_fuse(experts, x):
            return fused(x, routing, experts)
        slots = sort_slots(routing, experts.num_experts)
        return combine(experts(spread(x, slots), slots.counts), routing.weights.to(x.dtype), slots)

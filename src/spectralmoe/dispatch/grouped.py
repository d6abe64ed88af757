"""Sparse dispatch: sort the slots by expert, run each block once, gather back."""

from __future__ import annotations

from torch import Tensor

from spectralmoe.dispatch.base import combine, expert_rows, gather_tokens, sort_slots
from spectralmoe.experts import Experts
from spectralmoe.routing import Routing

__all__ = ["Grouped"]


class Grouped:
    """Dropless: each expert runs on exactly the tokens that chose it, however uneven the load."""

    def __call__(self, x: Tensor, routing: Routing, experts: Experts) -> Tensor:
        slots = sort_slots(routing, experts.num_experts)
        rows = expert_rows(experts(gather_tokens(x, slots), slots.counts), slots)
        return combine(rows, routing.weights.to(x.dtype), slots)

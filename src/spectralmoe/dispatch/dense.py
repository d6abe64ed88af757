"""Soft mixing: all experts on all tokens, as batched GEMMs where the bank has them."""

from __future__ import annotations

from torch import Tensor

from spectralmoe.dispatch.base import Dispatch
from spectralmoe.experts.base import Experts, per_row
from spectralmoe.routing import Routing

__all__ = ["Dense"]


class Dense(Dispatch):
    """Every expert on every token, weights 0 where it was not chosen. Best for soft routing and very small layers."""

    def __call__(self, x: Tensor, routing: Routing, experts: Experts) -> Tensor:
        weights = routing.gates(experts.num_experts).to(x.dtype)
        if routing.mask is None:
            return experts.mix(x, weights)
        padding = per_row(~routing.mask, x)  # it may hold nan, and its gradient too, which 0 * nan would spread
        return experts.mix(x.masked_fill(padding, 0), weights).masked_fill(padding, 0)

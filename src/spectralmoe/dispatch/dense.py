"""Soft mixing: all experts on all tokens, as batched GEMMs where the bank has them."""

from __future__ import annotations

from torch import Tensor

from spectralmoe.dispatch.base import expert_weights
from spectralmoe.experts import Experts
from spectralmoe.routing import Routing

__all__ = ["Dense"]


class Dense:
    """Every expert on every token, weights 0 where it was not chosen. Best for soft routing and very small layers."""

    def __call__(self, x: Tensor, routing: Routing, experts: Experts) -> Tensor:
        if routing.mask is not None:
            x = x.masked_fill(~routing.mask[:, None], 0)  # padding may hold nan, which 0 * nan would spread
        return experts.mix(x, expert_weights(routing, experts.num_experts).to(x.dtype))

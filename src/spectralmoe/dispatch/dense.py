"""Dense dispatch: all experts run on all tokens, as batched GEMMs if the bank has them."""

from __future__ import annotations

from torch import Tensor

from spectralmoe.dispatch.base import Dispatch
from spectralmoe.experts.answer import per_row
from spectralmoe.experts.base import Experts
from spectralmoe.routing import Routing

__all__ = ["Dense"]


class Dense(Dispatch):
    """Runs every expert on every token, with the weight 0 where it was not chosen.

    It suits soft routing and very small layers.

    >>> import torch
    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, Soft
    >>> layer = MoE(Router(LinearScorer(8, 4), Soft()), FeedForward(4, 8, 32), dispatch=Dense())
    >>> layer(torch.randn(10, 8)).shape
    torch.Size([10, 8])
    """

    def __call__(self, x: Tensor, routing: Routing, experts: Experts) -> Tensor:
        weights = routing.gates(experts.num_experts).to(x.dtype)
        if routing.mask is None:
            return experts.mix(x, weights)
        padding = per_row(~routing.mask, x)  # it may hold nan, and its gradient too, which 0 * nan would spread
        return experts.mix(x.masked_fill(padding, 0), weights).masked_fill(padding, 0)

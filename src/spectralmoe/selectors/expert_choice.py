"""Expert choice: each expert takes the tokens that score highest for it, so the load is even by construction.

Zhou et al., "Mixture-of-Experts with Expert Choice Routing", arXiv 2202.09368, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.routing import EMPTY
from spectralmoe.selectors.base import Selector, share_of

__all__ = ["ExpertChoice"]


class ExpertChoice(Selector):
    r"""Lets each expert take the :math:`\lceil N c / E \rceil` tokens that score highest for it.

    The scores are the softmax over the experts, and N counts real tokens. There are K = E slots: slot e of a token
    holds e if expert e took the token, else -1. A token may be taken by no expert or by all of them. The choice of one
    token depends on the others, so it is not causal: do not use it in a decoder.

    Args:
        capacity: c > 0, how many experts a token gets in the mean.

    Raises:
        UserError: capacity <= 0.

    >>> ExpertChoice(1.0).choose(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    tensor([[ 0, -1],
            [-1,  1]])
    """

    per_token = False

    def __init__(self, capacity: float) -> None:
        super().__init__()
        if not capacity > 0:
            raise UserError(f"ExpertChoice: capacity must be positive, got {capacity}")
        self.capacity = capacity

    def choose(self, logits: Tensor, *, mask: Tensor | None = None, context: dict[str, Any] | None = None) -> Tensor:
        n, num_experts = logits.shape
        scores = self.scores(logits)
        real = logits.new_ones(n, dtype=torch.bool) if mask is None else mask
        order = scores.masked_fill(~real[:, None], -torch.inf).argsort(dim=0, descending=True, stable=True)
        rank = torch.zeros_like(order).scatter(
            0, order, torch.arange(n, device=order.device)[:, None].expand(order.shape)
        )
        places = share_of(real.sum(), self.capacity, num_experts)
        taken = (rank < places) & real[:, None]
        experts = torch.arange(num_experts, device=logits.device).expand(n, -1)
        return experts.masked_fill(~taken, EMPTY)

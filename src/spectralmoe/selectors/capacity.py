"""Capacity: any selector, with a bound on the tokens that an expert takes.

Lepikhin et al., "GShard", arXiv 2006.16668, section 2.2; Fedus et al., "Switch Transformers", arXiv 2101.03961.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.routing import EMPTY
from spectralmoe.selectors.base import Score, Selector, share_of

__all__ = ["Capacity"]


class Capacity(Selector):
    r"""Lets each expert take at most :math:`\lceil f\,M / E \rceil` of the M slots that ``selector`` fills.

    Places go to first choices before second choices, and to earlier tokens before later ones; a slot that comes too
    late is emptied (-1, weight 0). ``Routing.dropped()`` reports the share of emptied slots.

    Args:
        selector: the selector whose choice is bounded; scores and weights are its own.
        factor: f; 1.0 leaves room for an even load only.

    Raises:
        UserError: factor <= 0; soft routing, which has no choice to bound.

    >>> from spectralmoe.selectors import TopK
    >>> crowd = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    >>> selector = Capacity(TopK(1), 1.0)
    >>> selector.choose(crowd).flatten().tolist()
    [0, 0, -1, 1]
    """

    per_token = False

    def __init__(self, selector: Selector, factor: float) -> None:
        super().__init__()
        if not factor > 0:
            raise UserError(f"Capacity: factor must be positive, got {factor}")
        self.selector, self.factor = selector, factor

    def bind(self, num_experts: int) -> None:
        if self.selector.is_soft(num_experts):
            raise UserError("Capacity: soft routing has no choice to bound; use a selector with k below E")
        self.selector.bind(num_experts)

    def scores(self, logits: Tensor) -> Tensor:
        return self.selector.scores(logits)

    def scored(self, logits: Tensor) -> Tensor | Score:
        return self.selector.scored(logits) if type(self).scores is Capacity.scores else self.scores(logits)

    def ranked(self, logits: Tensor) -> Tensor:
        return self.selector.ranked(logits)

    def choose(self, logits: Tensor, *, mask: Tensor | None = None, context: dict[str, Any] | None = None) -> Tensor:
        return self.limit(self.want(logits, mask=mask, context=context), logits.shape[-1])

    def want(self, logits: Tensor, *, mask: Tensor | None = None, context: dict[str, Any] | None = None) -> Tensor:
        return self.selector.choose(logits, mask=mask, context=context)

    def limit(self, wanted: Tensor, num_experts: int) -> Tensor:
        slots = wanted.T.reshape(-1)  # first choices of all tokens, then second choices
        filled = slots >= 0
        taken = (slots[:, None] == torch.arange(num_experts, device=slots.device)).long()
        place = taken.cumsum(0).gather(1, slots.clamp_min(0)[:, None]).squeeze(1)
        late = filled & (place > share_of(filled.sum(), self.factor, num_experts))
        return wanted.masked_fill(late.view(wanted.T.shape).T, EMPTY)

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        return self.selector.weigh(logits, indices)

"""Capacity: it bounds how many tokens an expert takes, for any selector.

Lepikhin et al., "GShard", arXiv 2006.16668, section 2.2; Fedus et al., "Switch Transformers", arXiv 2101.03961.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.routing import EMPTY
from spectralmoe.selectors.around import Around
from spectralmoe.selectors.base import Selector, share_of

__all__ = ["Capacity"]


class Capacity(Around):
    r"""Wraps a selector and lets each expert take at most :math:`\lceil f\,M / E \rceil` of the M slots that it fills.

    Places go to first choices before second choices, and to earlier tokens before later ones. A slot that comes too
    late is emptied (index -1, weight 0). ``Routing.dropped()`` gives the share of emptied slots.

    Args:
        selector: the selector that is wrapped; scores and weights are its own.
        factor: f > 0, the capacity factor; with 1.0 only an even load fits.

    Raises:
        UserError: factor <= 0, or the selector gives every token every expert.

    >>> from spectralmoe.selectors import TopK
    >>> crowd = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    >>> selector = Capacity(TopK(1), 1.0)
    >>> selector.limit(selector.choose(crowd), num_experts=2).flatten().tolist()
    [0, 0, -1, 1]
    """

    def __init__(self, selector: Selector, factor: float) -> None:
        super().__init__(selector)
        if not factor > 0:
            raise UserError(f"Capacity: factor must be positive, got {factor}")
        self.factor, self.per_token = factor, False
        self.normalize = False  # the weights of a token that loses all its experts sum to 0

    def bind(self, num_experts: int) -> None:
        super().bind(num_experts)
        if self.soft:
            raise UserError("Capacity: soft routing has no choice to bound; use a selector with k below E")
        self.fills = False

    def limit(self, wanted: Tensor, num_experts: int) -> Tensor:
        wanted = super().limit(wanted, num_experts)
        slots = wanted.T.reshape(-1)  # first choices of all tokens, then second choices
        filled = slots >= 0
        taken = (slots[:, None] == torch.arange(num_experts, device=slots.device)).long()
        place = taken.cumsum(0).gather(1, slots.clamp_min(0)[:, None]).squeeze(1)
        late = filled & (place > share_of(filled.sum(), self.factor, num_experts))
        return wanted.masked_fill(late.view(wanted.T.shape).T, EMPTY)

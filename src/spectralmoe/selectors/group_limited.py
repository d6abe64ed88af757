"""Group-limited choice: a token takes its experts only from the best groups of experts.

DeepSeek-AI, "DeepSeek-V3 Technical Report", arXiv 2412.19437, section 2.1.2 (node-limited routing, around
``Balanced``); "DeepSeek-V2", arXiv 2405.04434, section 2.1.3 (device-limited routing, around ``TopK``, one score
counted). Code: https://github.com/huggingface/transformers (Apache-2.0), whose rule this is.
Differs: how many scores of a group are counted is an argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectralmoe.errors import UserError, check_whole
from spectralmoe.routing import EMPTY
from spectralmoe.selectors.around import Around
from spectralmoe.selectors.balanced import Balanced
from spectralmoe.selectors.base import Selector, largest
from spectralmoe.selectors.topk import TopK

__all__ = ["GroupLimited"]


class GroupLimited(Around):
    r"""Wraps top-k and lets a token choose only from the best M of G groups of consecutive experts.

    Let r be the scores that the wrapped selector ranks by, a selection bias included. The value of the group of experts
    :math:`\mathcal{E}_g` is the sum of its c largest scores, :math:`v_g = \sum \mathrm{top}_c \{r_i : i \in
    \mathcal{E}_g\}`. A token gets the top-k of r within the M groups of largest v. Scores and weights are those of the
    wrapped selector without a limit.

    Args:
        selector: ``TopK`` or ``Balanced``. Other wrappers, such as ``Capacity``, go around this one.
        groups: G, which divides E.
        groups_on: M, from how many groups a token may choose.
        counted: c, how many scores of a group are summed: 2 in DeepSeek-V3, 1 in DeepSeek-V2.

    Raises:
        UserError: groups do not divide E or hold fewer than c experts, M is not 1 to G, M groups hold fewer than k
            experts, the selector is another one, or k = E.

    >>> from spectralmoe.selectors import TopK
    >>> selector = GroupLimited(TopK(2), groups=2, groups_on=1)
    >>> selector.bind(4)
    >>> selector.choose(torch.tensor([[3.0, 0.0, 2.5, 2.4], [3.0, 2.0, 2.5, 0.0]]))
    tensor([[2, 3],
            [0, 1]])
    """

    selector: TopK | Balanced

    def __init__(self, selector: Selector, groups: int, groups_on: int, *, counted: int = 2) -> None:
        super().__init__(selector)
        if not isinstance(selector, TopK | Balanced):
            raise UserError(
                f"GroupLimited: {type(selector).__name__} does not choose the k largest scores; use TopK or Balanced"
            )
        for name, value in {"groups": groups, "groups_on": groups_on, "counted": counted}.items():
            check_whole("GroupLimited", name, value)
        if groups_on > groups:
            raise UserError(f"GroupLimited: groups_on={groups_on} is more than there are, groups={groups}")
        self.groups, self.groups_on, self.counted = groups, groups_on, counted

    def bind(self, num_experts: int) -> None:
        super().bind(num_experts)
        if self.soft:
            raise UserError("GroupLimited: soft routing makes no choice to limit; use a selector with k below E")
        if num_experts % self.groups:
            raise UserError(f"GroupLimited: groups={self.groups} do not divide E={num_experts} experts; take a divisor")
        size, k = num_experts // self.groups, self.selector.k
        if self.counted > size:
            raise UserError(f"GroupLimited: counted={self.counted}, but a group holds {size} of E={num_experts}")
        if k > self.groups_on * size:
            raise UserError(
                f"GroupLimited: k={k} experts a token were asked for, but groups_on={self.groups_on} groups hold "
                f"{self.groups_on * size}"
            )

    def ranked(self, logits: Tensor) -> Tensor:
        """Return the wrapped selector's ranking (N, E), 0 outside the token's groups."""
        return super().ranked(logits).masked_fill(~self._on(logits), 0)

    def choose(self, logits: Tensor, *, mask: Tensor | None = None, context: dict[str, Any] | None = None) -> Tensor:
        on = self._on(logits)
        values = logits if isinstance(self.selector, TopK) else super().ranked(logits)  # scores may underflow
        chosen = largest(values.masked_fill(~on, -torch.inf), self.selector.k, mask)
        return chosen.masked_fill(~on.gather(1, chosen.clamp_min(0)), EMPTY)

    def _on(self, logits: Tensor) -> Tensor:
        """Which experts (N, E) lie in the groups that a token may choose from."""
        grouped = super().ranked(logits).unflatten(-1, (self.groups, -1))
        worth = grouped.topk(self.counted, dim=-1).values.sum(-1)
        best = worth.topk(self.groups_on, dim=-1).indices
        on = torch.zeros_like(worth, dtype=torch.bool).scatter(1, best, True)
        return on[..., None].expand_as(grouped).flatten(1)

"""Around: the base class of selectors that wrap another selector."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spectralmoe.selectors.base import Score, Selector

__all__ = ["Around"]


class Around(Selector):
    """Wraps a selector and forwards every call to it; a subclass overrides the one method that it changes.

    The attributes ``score``, ``normalize``, ``per_token``, ``soft`` and ``fills`` are copied from the wrapped selector.
    A subclass that may empty slots sets ``fills`` to False in its ``bind``. The work after an optimizer step
    (``Part.update``, ``Part.after_step``) is done for the wrapped selector too, without a call by the wrapper.

    Args:
        selector: the selector that is wrapped.

    >>> import torch
    >>> from spectralmoe.selectors import TopK
    >>> class Second(Around):  # the first choice is always lost
    ...     def limit(self, wanted, num_experts):
    ...         return super().limit(wanted, num_experts).index_fill(1, torch.tensor([0]), -1)
    >>> selector = Second(TopK(2))
    >>> selector.limit(selector.choose(torch.tensor([[1.0, 3.0, 2.0]])), 3)
    tensor([[-1,  2]])
    """

    def __init__(self, selector: Selector) -> None:
        super().__init__()
        self.selector = selector
        self.score, self.normalize, self.per_token = selector.score, selector.normalize, selector.per_token

    def bind(self, num_experts: int) -> None:
        self.selector.bind(num_experts)
        self.soft, self.fills = self.selector.soft, self.selector.fills

    def scored(self, logits: Tensor) -> Tensor | Score:
        return self.selector.scored(logits)

    def ranked(self, logits: Tensor) -> Tensor:
        return self.selector.ranked(logits)

    def choose(self, logits: Tensor, *, mask: Tensor | None = None, context: dict[str, Any] | None = None) -> Tensor:
        return self.selector.choose(logits, mask=mask, context=context)

    def limit(self, wanted: Tensor, num_experts: int) -> Tensor:
        return self.selector.limit(wanted, num_experts)

    def emptied(self, indices: Tensor) -> Tensor:
        return self.selector.emptied(indices)

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        return self.selector.weigh(logits, indices)

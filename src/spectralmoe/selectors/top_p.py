"""Top-p: a token gets as many experts as it takes to reach a total probability of p.

Huang et al., "Harder Tasks Need More Experts: Dynamic Routing in MoE Models", arXiv 2403.07652, section 3.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from spectralmoe.errors import UserError
from spectralmoe.routing import EMPTY
from spectralmoe.selectors.base import Score, Selector, check_fits, check_k

__all__ = ["TopP"]


class TopP(Selector):
    r"""Gives a token the smallest set of experts, best first, whose normalised scores sum to at least p.

    There are K = ``max_k`` slots, -1 behind the last one used.

    Args:
        p: 0 < p <= 1.
        max_k: the largest number of experts a token; None, the default, is E.
        normalize, score: as in ``TopK``. With ``normalize`` a token that has one expert gives the router no gradient.

    Raises:
        UserError: p lies outside (0, 1], or ``TopK`` would refuse ``max_k`` as its k.

    >>> import torch
    >>> TopP(0.7).choose(torch.tensor([[0.6, 0.3, 0.1]]).log())
    tensor([[ 0,  1, -1]])
    """

    def __init__(
        self, p: float, *, max_k: int | None = None, normalize: bool = False, score: Score = "softmax"
    ) -> None:
        super().__init__()
        if not 0 < p <= 1:
            raise UserError(f"TopP: p must lie in (0, 1], got {p}")
        check_k("TopP", 2 if max_k is None else max_k, normalize, score)
        self.p, self.max_k, self.normalize, self.score = p, max_k, normalize, score

    def bind(self, num_experts: int) -> None:
        if self.max_k is not None:
            check_fits("TopP", self.max_k, num_experts)

    def choose(self, logits: Tensor, *, mask: Tensor | None = None, context: dict[str, Any] | None = None) -> Tensor:
        ordered, indices = logits.sort(dim=-1, descending=True, stable=True)
        mass = (ordered if self.score == "softmax" else F.logsigmoid(ordered)).softmax(-1)  # scores may underflow
        unused = (mass.cumsum(-1) - mass >= self.p)[:, : self.max_k]
        indices = indices[:, : self.max_k]
        unused[:, 0] = False
        if mask is not None:
            unused = unused | ~mask[:, None]
        return indices.masked_fill(unused, EMPTY)

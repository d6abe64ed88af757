"""Soft routing: every token uses every expert, weighted by the expert's score."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectralmoe.errors import one_of
from spectralmoe.routing import EMPTY
from spectralmoe.selectors.base import Score, Selector

__all__ = ["Soft"]


class Soft(Selector):
    r"""Gives each token all E experts: of K = E slots, slot e holds expert e with the weight :math:`w_{te} = p_{te}`.

    p is the softmax or the sigmoid of the logits. Jacobs et al., "Adaptive Mixtures of Local Experts", Neural
    Computation 3 (1991), where p is the softmax.

    Args:
        normalize: whether the weights of a token are divided by their sum, which is 1 anyway for the softmax.
        score: "softmax" or "sigmoid".

    Raises:
        UserError: an unknown score.

    >>> Soft().choose(torch.zeros(2, 3))
    tensor([[0, 1, 2],
            [0, 1, 2]])
    """

    soft = True
    fills = True

    def __init__(self, *, normalize: bool = False, score: Score = "softmax") -> None:
        super().__init__()
        if score not in ("softmax", "sigmoid"):
            raise one_of("score", score, ["sigmoid", "softmax"])
        self.normalize, self.score = normalize, score

    def choose(self, logits: Tensor, *, mask: Tensor | None = None, context: dict[str, Any] | None = None) -> Tensor:
        everyone = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape)
        return everyone.clone() if mask is None else everyone.masked_fill(~mask[:, None], EMPTY)

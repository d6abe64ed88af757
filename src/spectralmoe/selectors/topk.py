"""Top-k: a token gets the k experts with the largest scores."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spectralmoe.selectors.base import Score, Selector, check_fits, check_k, largest

__all__ = ["TopK"]


class TopK(Selector):
    r"""Gives a token the k experts with the largest scores p, the softmax or the sigmoid of the logits.

    The weights are the scores of the chosen experts, :math:`w_{tj} = p_{t,i_j}`; with ``normalize`` they are divided by
    their sum. Shazeer et al., arXiv 1701.06538; without ``normalize`` and with k=1 it is Switch, arXiv 2101.03961.

    Args:
        k: experts a token; K = k.
        normalize: whether the weights of a token are divided by their sum.
        score: "softmax" or "sigmoid".

    Raises:
        UserError: k < 1, k > E, an unknown score, or k = 1 with ``normalize`` (the router would get no gradient).

    >>> import torch
    >>> TopK(2).choose(torch.tensor([[0.1, 3.0, 2.0]]))
    tensor([[1, 2]])
    """

    fills = True

    def __init__(self, k: int, *, normalize: bool = False, score: Score = "softmax") -> None:
        super().__init__()
        check_k("TopK", k, normalize, score)
        self.k, self.normalize, self.score = k, normalize, score

    def bind(self, num_experts: int) -> None:
        check_fits("TopK", self.k, num_experts)
        self.soft = self.k == num_experts

    def choose(self, logits: Tensor, *, mask: Tensor | None = None, context: dict[str, Any] | None = None) -> Tensor:
        return largest(logits, self.k, mask)

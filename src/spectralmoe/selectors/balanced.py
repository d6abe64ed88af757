"""Top-k balanced without a loss: each expert has a bias, which is used for the choice only.

Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", arXiv 2408.15664, algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.selectors.base import Score, Selector, check_fits, check_k, largest
from spectralmoe.sharding import assign_

__all__ = ["Balanced"]


class Balanced(Selector):
    r"""Chooses the k experts with the largest ``scores + bias``; the combine weights come from the scores alone.

    After each optimizer step :math:`b_i \leftarrow b_i + u\,\mathrm{sign}(\bar c - c_i)`, where c_i is how many slots
    expert i got in the step (int64, summed over all micro-batches and ranks). ``after_step`` or ``attach`` does it;
    without one of them the bias stays at 0.

    Args:
        k: experts a token, fewer than E. Where a token uses all experts, ``SoftBalanced`` evens the load.
        score: "sigmoid" (the paper's) or "softmax". Squared distances as logits underflow under a sigmoid: with
            ``PrototypeScorer`` use softmax.
        normalize: whether the weights of a token are divided by their sum.
        rate: u >= 0, in units of the score; 0.001 in the paper.

    Raises:
        UserError: k < 1, k >= E, rate < 0, k = 1 with ``normalize`` (the router would get no gradient), an unknown
            score, or a selector that another router has already.

    >>> selector = Balanced(2)
    >>> selector.bind(3)
    >>> selector.update(torch.tensor([4, 1, 1]))
    >>> [round(b, 4) for b in selector.bias.tolist()]
    [-0.001, 0.001, 0.001]
    """

    bias: Tensor
    fills = True

    def __init__(self, k: int, *, score: Score = "sigmoid", normalize: bool = True, rate: float = 1e-3) -> None:
        super().__init__()
        check_k("Balanced", k, normalize, score)
        if rate < 0:
            raise UserError(f"Balanced: rate must not be negative, got {rate}")
        self.k, self.score, self.normalize, self.rate = k, score, normalize, rate

    def bind(self, num_experts: int) -> None:
        check_fits("Balanced", self.k, num_experts)
        if self.k == num_experts:
            raise UserError(f"Balanced: k={self.k} of E={num_experts} experts is soft routing; give a k below E")
        if "bias" in self._buffers:
            raise UserError("Balanced: this selector belongs to another router already; give each router its own")
        self.register_buffer("bias", torch.zeros(num_experts))

    def ranked(self, logits: Tensor) -> Tensor:
        """Return scores plus bias (N, E), the bias shifted so that its smallest entry is 0, which changes no choice."""
        return self.scores(logits) + (self.bias - self.bias.amin())

    def choose(self, logits: Tensor, *, mask: Tensor | None = None, context: dict[str, Any] | None = None) -> Tensor:
        return largest(self.ranked(logits), self.k, mask)

    def statistics(self, tokens: Tensor, counts: Tensor) -> Tensor:
        return counts

    def update(self, counts: Tensor) -> None:
        behind = counts.sum() - counts * counts.numel()
        assign_(self.bias, self.bias + self.rate * behind.sign())

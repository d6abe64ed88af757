"""Threshold: a token gets those of its k best experts that score at least theta.

Cheng et al., "ERMoE: Eigen-Reparameterized Mixture-of-Experts", arXiv 2511.10971, section on routing. Authors' code:
github.com/Belis0811/ERMoE (AGPL-3.0 and no commercial use; this file is written from the equations). Differs: what a
token without an eligible expert gets is an option, and scores may be a softmax or a sigmoid of the logits.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

from spectralmoe.errors import UserError, one_of
from spectralmoe.routing import EMPTY, Score
from spectralmoe.selectors.base import Selector, check_fits, check_k, largest, take

__all__ = ["Threshold"]

_LEAST = 1e-6  # of a score that weighs


class Threshold(Selector):
    r"""Gives a token those of its k best experts with :math:`S_e \ge \theta`, and the weights :math:`S_e / \sum_j S_j`.

    S are the logits themselves, which suits ``BasisScorer``, or their softmax or sigmoid. There are K = k slots, -1 in
    those of experts below theta. A chosen expert's logit counts as at least 1e-6, so that no weight is negative.

    Args:
        k: the largest number of experts a token.
        threshold: theta, a fixed number.
        normalize: whether the weights of a token are divided by their sum; else they are S. With ``normalize`` a token
            that has one expert gives the router no gradient.
        score: "logit", "softmax" or "sigmoid".
        fallback: what a token gets if no expert reaches theta: "topk", its best expert; or "none", no expert.

    Raises:
        UserError: k < 1, k > E, threshold is nan, score or fallback is unknown, or k = 1 with ``normalize`` (the router
            would get no gradient).

    >>> import torch
    >>> logits = torch.tensor([[0.1, 0.9, 0.6, 0.7], [0.1, 0.6, 0.2, 0.4], [0.3, 0.1, 0.4, 0.2]])
    >>> selector = Threshold(2)
    >>> selector.choose(logits)
    tensor([[ 1,  3],
            [ 1, -1],
            [ 2, -1]])
    >>> selector.weigh(logits, selector.choose(logits))
    tensor([[0.5625, 0.4375],
            [1.0000, 0.0000],
            [1.0000, 0.0000]])
    """

    score: Any  # "logit", or one of those of the base

    def __init__(
        self,
        k: int,
        threshold: float = 0.5,
        *,
        normalize: bool = True,
        score: Literal["logit"] | Score = "logit",
        fallback: Literal["topk", "none"] = "topk",
    ) -> None:
        super().__init__()
        if score not in ("logit", "softmax", "sigmoid"):
            raise one_of("score", score, ["logit", "sigmoid", "softmax"])
        check_k("Threshold", k, normalize, "softmax")
        if math.isnan(threshold):
            raise UserError("Threshold: threshold must be a number, got nan")
        if fallback not in ("topk", "none"):
            raise one_of("fallback", fallback, ["none", "topk"])
        self.k, self.threshold, self.normalize, self.fallback = k, threshold, normalize, fallback
        self.score = score

    def bind(self, num_experts: int) -> None:
        check_fits("Threshold", self.k, num_experts)

    def scored(self, logits: Tensor) -> Tensor | Score:
        return logits.clamp_min(_LEAST) if self._reads_logits else self.score

    def choose(self, logits: Tensor, *, mask: Tensor | None = None, context: dict[str, Any] | None = None) -> Tensor:
        chosen = largest(logits, self.k, mask)
        eligible = take(logits if self._reads_logits else self.scores(logits), chosen) >= self.threshold
        if self.fallback == "topk":
            eligible[:, 0] = True
        return chosen.masked_fill(~eligible, EMPTY)

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        if not (self.normalize and self._reads_logits):
            return super().weigh(logits, indices)
        chosen = take(self.scores(logits), indices)
        return chosen / chosen.sum(-1, keepdim=True).clamp_min(_LEAST)

    @property
    def _reads_logits(self) -> bool:
        return bool(self.score == "logit")

"""Gates of the card alone: what L2R is compared with, each with one of its parts taken away or another in its place."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.context import Rows
from spectralmoe.scorers import SaturatedScorer, Scorer

__all__ = ["ConstantScorer", "LowRankScorer", "TwoLayerScorer"]


class LowRankScorer(Scorer):
    """Logits k (W x) with W (R, D) and k (E, R): the low-rank space with plain inner products."""

    def __init__(self, dim: int, num_experts: int, *, rank: int = 16) -> None:
        super().__init__(dim, num_experts)
        self.rank = rank
        self.projection = nn.Parameter(torch.randn(rank, dim) * dim**-0.5)
        self.keys = nn.Parameter(torch.randn(num_experts, rank) * rank**-0.5)

    def forward(self, x: Tensor, *, context: Rows | None = None) -> Tensor:
        return F.linear(self.query(x), self.keys.to(x.dtype))

    def query(self, x: Tensor) -> Tensor:
        """W x (N, R)."""
        return F.linear(x, self.projection.to(x.dtype))


class TwoLayerScorer(LowRankScorer):
    """Logits k gelu(W x): as many numbers, and bends of another kind."""

    def query(self, x: Tensor) -> Tensor:
        return 1.5 * F.gelu(super().query(x))  # of variance about 1, as the others


class ConstantScorer(SaturatedScorer):
    """One anchor and phi = gamma whatever the norm of the query: cosines with psi, without the saturation."""

    def forward(self, x: Tensor, *, context: Rows | None = None) -> Tensor:
        norm = F.linear(x, self.projection.to(x.dtype)).norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return self.log_gain.to(x.dtype).exp() * F.linear(x, self.matrix.to(x.dtype)) / norm

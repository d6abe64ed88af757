"""Gates of the card alone: by what the network holds, and by chance."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.context import Rows
from spectralmoe.errors import UserError
from spectralmoe.scorers import Scorer

__all__ = ["ChanceScorer", "ContentScorer", "EvenScorer"]

_SURE = 20.0


class ContentScorer(Scorer):
    """The gate of ``SpectrumScorer`` on the pooled map x (N, D) in place of a spectrum: as large where D = 16."""

    def __init__(self, dim: int, num_experts: int, *, hidden: int = 32) -> None:
        super().__init__(dim, num_experts)
        self.hidden = hidden
        self.norm, self.up = nn.LayerNorm(dim), nn.Linear(dim, hidden)
        self.weight = nn.Parameter(torch.randn(num_experts, hidden) * hidden**-0.5)
        self.bias = nn.Parameter(torch.zeros(num_experts))

    def forward(self, x: Tensor, *, context: Rows | None = None) -> Tensor:
        return F.linear(F.gelu(self.up(self.norm(x))), self.weight, self.bias)


class ChanceScorer(Scorer):
    """The second of two experts with probability ``share``, drawn anew at each forward, whatever the record is."""

    def __init__(self, dim: int, num_experts: int, *, share: float) -> None:
        super().__init__(dim, num_experts)
        if num_experts != 2 or not 0 <= share <= 1:
            raise UserError(f"ChanceScorer: two experts and a share from 0 to 1, got {num_experts} and {share}")
        self.share = share

    def forward(self, x: Tensor, *, context: Rows | None = None) -> Tensor:
        second = torch.rand(len(x), 1, device=x.device) < self.share
        return _SURE * torch.cat([~second, second], 1).to(x.dtype)


class EvenScorer(Scorer):
    """The same sure logit for every expert: where the choice is replayed, its weight by a sigmoid is 1."""

    def forward(self, x: Tensor, *, context: Rows | None = None) -> Tensor:
        return x.new_full((len(x), self.num_experts), _SURE)

"""The control and an ablation: bases that are nobody's, and experts that leave their manifold."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spectralmoe.experts import EigenExperts, Experts
from spectralmoe.scorers import BasisScorer

__all__ = ["FreeExperts", "RandomBases"]


class RandomBases(BasisScorer):
    """The same scores in random orthonormal bases that no expert has, and that never move."""

    bases: Tensor

    def __init__(self, dim: int, num_experts: int, *, rank: int, score: Literal["context", "energy"]) -> None:
        super().__init__(dim, num_experts, score=score)
        self.rank = rank
        self.register_buffer("bases", EigenExperts(num_experts, dim, rank).right.detach())

    def spec_arguments(self) -> dict[str, object]:
        return {}

    def bind_experts(self, experts: Experts) -> None:
        """It reads no bank."""

    @property
    def is_frozen(self) -> bool:
        return True

    def coordinates(self, x: Tensor) -> Tensor:
        return torch.einsum("nd,edr->ner", x, self.bases.to(x.dtype))


class FreeExperts(EigenExperts):
    """Experts that start in eigen-form and are never put back on it."""

    manifold = ()

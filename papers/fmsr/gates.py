"""The gate of the card alone: as many features as the spectrum gate reads, made by random filters that never learn."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.errors import UserError
from spectralmoe.scorers import SpectrumScorer

__all__ = ["RandomFilterScorer", "filter_features"]


class RandomFilterScorer(SpectrumScorer):
    """The spectrum gate with log powers of random filter responses in the place of what it reads of the spectrum.

    Args:
        size: side of the filters, odd. They are drawn once, of unit norm, and stay.
    """

    filters: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        bands: int = 8,
        hidden: int = 32,
        statistics: bool = True,
        token: bool = False,
        key: str = "map",
        size: int = 5,
    ) -> None:
        super().__init__(dim, num_experts, bands=bands, hidden=hidden, statistics=statistics, token=token, key=key)
        if size < 1 or size % 2 == 0:
            raise UserError(f"RandomFilterScorer: size must be odd, got {size}")
        self.size = size
        filters = torch.randn(len(self.norm.weight), 1, size, size)
        self.register_buffer("filters", filters / filters.flatten(1).norm(dim=1)[:, None, None, None])

    def features(self, maps: Tensor) -> Tensor:
        return filter_features(maps, self.filters)


def filter_features(maps: Tensor, filters: Tensor) -> Tensor:
    """log10 of the mean squared response of maps (N, C, H, W) to filters (F, 1, k, k), mean over channels: (N, F)."""
    responses = F.conv2d(maps.flatten(0, 1)[:, None], filters.to(maps.dtype))
    powers = responses.square().mean((2, 3)).view(*maps.shape[:2], -1).mean(1)
    return (powers + 1e-6).log10()

"""Units: what a layer routes. The router reads queries (..., D), the experts get rows of any shape.

One choice an image, made from its pooled features: Zamfir et al., "Complexity Experts are Task-Discriminative Learners
for Any Image Restoration" (MoCE-IR), arXiv 2411.18466.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectralmoe.errors import UserError

__all__ = ["UNITS", "Pixel", "Sample", "Token", "Unit"]


class Unit(nn.Module):
    """Says what of x is routed. ``split`` and ``join`` rearrange; neither computes but for a pool.

    The leading dimensions L of queries and rows are the same; masks and the recorded ``Routing.shape`` have them.
    """

    pooled = False
    """Whether the queries are made from the rows; else they are the rows, and as wide as the experts."""

    def __init__(self) -> None:
        super().__init__()

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (*L, D) for the router and rows (*L, *S) for the experts."""
        raise NotImplementedError

    def join(self, rows: Tensor) -> Tensor:
        """Rows (*L, *S), laid out as x was."""
        raise NotImplementedError


class Token(Unit):
    """Each vector of x (..., D): the usual unit."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    def join(self, rows: Tensor) -> Tensor:
        return rows


class Pixel(Unit):
    """Each position of maps x (B, C, H, W), or signals (B, C, T): vectors of C channels, D = C.

    >>> queries, rows = Pixel().split(torch.zeros(2, 8, 3, 4))
    >>> tuple(rows.shape), tuple(Pixel().join(rows).shape)
    ((2, 3, 4, 8), (2, 8, 3, 4))
    """

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() < 3:
            raise UserError(f"Pixel routes the positions of maps (B, C, H, W), got a tensor of shape {tuple(x.shape)}")
        rows = x.movedim(1, -1)
        return rows, rows

    def join(self, rows: Tensor) -> Tensor:
        return rows.movedim(-1, 1)


class Sample(Unit):
    """Each sample of x (B, *S) as a whole: the router reads pooled queries (B, D), an expert gets all of (*S).

    Args:
        pool: (B, *S) -> (B, D), or (B, D, 1, 1); by default the mean over all positions of each channel (B, C, ...).

    >>> queries, rows = Sample().split(torch.ones(2, 8, 3, 4))
    >>> tuple(queries.shape), tuple(rows.shape)
    ((2, 8), (2, 8, 3, 4))
    """

    pooled = True

    def __init__(self, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.pool = pool

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() < 2:
            raise UserError(f"Sample routes samples (B, C, ...), got a tensor of shape {tuple(x.shape)}")
        if self.pool is not None:
            return self.pool(x).flatten(1), x
        return x.unsqueeze(-1).flatten(2).mean(2, dtype=torch.promote_types(x.dtype, torch.float32)), x

    def join(self, rows: Tensor) -> Tensor:
        return rows


UNITS: dict[str, type[Unit]] = {"token": Token, "pixel": Pixel, "sample": Sample}

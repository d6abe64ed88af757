"""Units say what a layer routes: tokens, pixels or whole samples.

The router reads queries (..., D), and the experts get rows of any shape. One choice for each image, made from its
pooled features, is that of Zamfir et al., "Complexity Experts are Task-Discriminative Learners for Any Image
Restoration" (MoCE-IR), arXiv 2411.18466.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectralmoe.errors import UserError

__all__ = ["UNITS", "Pixel", "Sample", "Token", "Unit"]


class Unit(nn.Module):
    """The base class of units: ``split`` makes queries and rows of a layer's input, ``join`` puts rows back together.

    Queries and rows have the same leading dimensions L, which masks and the recorded ``Routing.shape`` have, too.
    """

    pooled = False
    """Whether the queries are computed from the rows; else they are the rows."""

    def __init__(self) -> None:
        super().__init__()

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries (*L, D) for the router and rows (*L, *S) for the experts."""
        raise NotImplementedError

    def join(self, rows: Tensor) -> Tensor:
        """Lay out rows (*L, *S) as x was."""
        raise NotImplementedError


class Token(Unit):
    """Routes each vector of x (..., D); this is the default."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    def join(self, rows: Tensor) -> Tensor:
        return rows


class Pixel(Unit):
    """Routes each position of maps x (B, C, H, W) or signals (B, C, T), a vector of D = C channels.

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
    """Routes each sample of x (B, *S) as a whole: the router reads pooled features (B, D), an expert all of (*S).

    Args:
        pool: a module (B, *S) -> (B, D) or (B, D, 1, 1); None takes the mean of each channel over all positions of
            (B, C, ...).

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

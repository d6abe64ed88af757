"""Copies of a sample: does a correction hold for what looks almost the same?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Augment", "neighbours", "noisy", "shifted"]

Augment = Callable[[Tensor], Tensor]
"""(k, ...) -> (k * m, ...): m copies of each sample, the copies of one sample together."""

SIGMA = 0.1


def noisy(x: Tensor, count: int = 32, *, sigma: float = SIGMA, seed: int = 0) -> Tensor:
    """``count`` copies of each sample of x (k, ...) with Gaussian noise, not clipped: (k * count, ...).

    >>> noisy(torch.zeros(2, 1, 4, 4), 3).shape
    torch.Size([6, 1, 4, 4])
    """
    copies = x.repeat_interleave(count, 0)
    noise = torch.randn(copies.shape, dtype=torch.float32, generator=torch.Generator().manual_seed(seed))
    moved: Tensor = copies + sigma * noise.to(copies)
    return moved


def shifted(x: Tensor) -> Tensor:
    """The eight shifts by one pixel of each image of x (k, C, H, W), the edge repeated: (8k, C, H, W).

    >>> shifted(torch.arange(9.0).view(1, 1, 3, 3))[0, 0]
    tensor([[0., 0., 1.],
            [0., 0., 1.],
            [3., 3., 4.]])
    """
    h, w = x.shape[-2:]
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    moved = [padded[..., i : i + h, j : j + w] for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    return torch.stack(moved, 1).flatten(0, 1)


def neighbours(x: Tensor, *, count: int = 64, sigma: float = SIGMA, seed: int = 1) -> Tensor:
    """``count`` noisy copies of each sample and, for images (k, C, H, W), half as many shifted ones.

    What ``augment`` may be. Each of the eight shifts comes count / 16 times (at least once).
    """
    copies = noisy(x, count, sigma=sigma, seed=seed).unflatten(0, (len(x), count))
    if x.dim() == 4:
        moved = shifted(x).unflatten(0, (len(x), 8)).repeat_interleave(max(count // 16, 1), 1)
        copies = torch.cat([copies, moved], 1)
    whole: Tensor = copies.flatten(0, 1)
    return whole

"""Altered copies of a sample (noise, shifts, rotations, contrast), on which a correction is tested."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, radians, sin

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["COPIES", "Augment", "CopyKind", "contrasted", "copies_of", "neighbours", "noisy", "rotated", "shifted"]

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


def shifted(x: Tensor, by: int = 1) -> Tensor:
    """The eight shifts by ``by`` pixels of each image of x (k, C, H, W), the edge repeated: (8k, C, H, W).

    >>> shifted(torch.arange(9.0).view(1, 1, 3, 3))[0, 0]
    tensor([[0., 0., 1.],
            [0., 0., 1.],
            [3., 3., 4.]])
    """
    h, w = x.shape[-2:]
    padded = F.pad(x, (by, by, by, by), mode="replicate")
    places = [(i * by, j * by) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    return torch.stack([padded[..., i : i + h, j : j + w] for i, j in places], 1).flatten(0, 1)


def rotated(x: Tensor, degrees: Sequence[float] = (-10.0, 10.0)) -> Tensor:
    """Each image of x (k, C, H, W) turned by each angle about its centre, the edge repeated: (k * angles, C, H, W).

    A positive angle turns counterclockwise. Pixels are interpolated linearly.

    >>> rotated(torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]]), [90.0]).round()
    tensor([[[[1., 0.],
              [0., 0.]]]])
    """
    h, w = x.shape[-2:]
    turned = []
    for c, s in ((cos(radians(angle)), sin(radians(angle))) for angle in degrees):
        matrix = torch.tensor([[c, -s * h / w, 0.0], [s * w / h, c, 0.0]], device=x.device)
        grid = F.affine_grid(matrix.expand(len(x), 2, 3), list(x.shape), align_corners=False)
        turned.append(F.grid_sample(x.float(), grid, padding_mode="border", align_corners=False).to(x.dtype))
    return torch.stack(turned, 1).flatten(0, 1)


def contrasted(x: Tensor, factors: Sequence[float] = (0.7, 1.3)) -> Tensor:
    """Each image of x (k, C, H, W) with its distance from its mean grey scaled, not clipped: (k * factors, C, H, W).

    >>> contrasted(torch.tensor([[[[0.0, 1.0]]]]), [0.5]).tolist()
    [[[[0.25, 0.75]]]]
    """
    mean = x.mean((-3, -2, -1), keepdim=True)
    return torch.stack([mean + factor * (x - mean) for factor in factors], 1).flatten(0, 1)


def neighbours(x: Tensor, *, count: int = 64, sigma: float = SIGMA, seed: int = 1) -> Tensor:
    """``count`` noisy copies of each sample and, for images (k, C, H, W), half as many shifted ones.

    Give it as ``augment`` to ``adapt_one``. Each of the eight shifts by one pixel comes count / 16 times (at least
    once).
    """
    copies = noisy(x, count, sigma=sigma, seed=seed).unflatten(0, (len(x), count))
    if x.dim() == 4:
        moved = shifted(x).unflatten(0, (len(x), 8)).repeat_interleave(max(count // 16, 1), 1)
        copies = torch.cat([copies, moved], 1)
    whole: Tensor = copies.flatten(0, 1)
    return whole


@dataclass(frozen=True, slots=True)
class CopyKind:
    """One kind of copies on which a correction is scored.

    Attributes:
        text: what they are, for people.
        make: samples (k, ...) -> their copies (k * m, ...), the copies of one sample together.
        built_from: whether ``neighbours`` makes the very same copies, so that a correction which was built from those
            is expected to hold on them.
        images: whether it takes images (k, C, H, W) alone.
    """

    text: str
    make: Augment
    built_from: bool = False
    images: bool = True


COPIES: dict[str, CopyKind] = {
    "noisy": CopyKind("noisy", noisy, images=False),
    "shifted_two": CopyKind("shifted 2 px", lambda x: shifted(x, 2)),
    "rotated": CopyKind("rotated 10°", rotated),
    "contrast": CopyKind("other contrast", contrasted),
    "shifted_one": CopyKind("shifted 1 px", shifted, built_from=True),
}
"""The kinds by their key in results. The noise of ``noisy`` is drawn anew; ``neighbours`` has other draws of it."""


def copies_of(x: Tensor) -> dict[str, Tensor]:
    """Copies of samples x (k, ...) of every kind that fits them: key of ``COPIES`` -> (k * m, ...)."""
    return {key: kind.make(x) for key, kind in COPIES.items() if x.dim() == 4 or not kind.images}

"""Views of grey images: upper half, lower half and spectrum, any of which may be missing.

A small stand-in for samples of several modalities: each view says something about the class, none says all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectralmoe.errors import UserError

__all__ = ["VIEWS", "Scales", "present_views", "scales_of", "views_of"]

VIEWS = ("upper half", "lower half", "spectrum")

Scales = tuple[tuple[float, float], ...]
"""Mean and standard deviation of all values of each view."""


def views_of(images: Tensor, scales: Scales | None = None) -> list[Tensor]:
    r"""The views of grey images (N, 1, H, W): (N, W * (H // 2)), (N, W * (H - H // 2)), (N, H * (W // 2 + 1)).

    The third is :math:`\log(1 + |\mathrm{FFT}(x)|)`, the half of it that a real image does not repeat.

    Args:
        scales: means that are subtracted and standard deviations that are divided by; None: the values as they are.

    Raises:
        UserError: images with colours, or of a height below 2.

    >>> [tuple(view.shape) for view in views_of(torch.rand(5, 1, 8, 8))]
    [(5, 32), (5, 32), (5, 40)]
    """
    if images.dim() != 4 or images.shape[1] != 1 or images.shape[2] < 2:
        raise UserError(f"views are made of grey images (N, 1, H, W), H at least 2; got {tuple(images.shape)}")
    half, pixels = images.shape[2] // 2, images[:, 0]
    views = [part.flatten(1) for part in (pixels[:, :half], pixels[:, half:], torch.fft.rfft2(pixels).abs().log1p())]
    if scales is None:
        return views
    return [(view - mean) / std for view, (mean, std) in zip(views, scales, strict=True)]


def scales_of(views: Sequence[Tensor]) -> Scales:
    """Mean and standard deviation of all values of each view (N, W), with the digits that are kept beside a model."""
    return tuple((round(float(view.mean()), 4), max(round(float(view.std()), 4), 1e-3)) for view in views)


def present_views(count: int, rate: float, generator: torch.Generator) -> Tensor:
    """Which views are there, for ``count`` samples: (N, V) bool. Each is missing with probability ``rate``; a sample
    that would have lost all keeps one of them, each as likely.

    Raises:
        UserError: a rate outside [0, 1).

    >>> present_views(4, 0.0, torch.Generator()).all().item()
    True
    """
    if not 0 <= rate < 1:
        raise UserError(f"views go missing at a rate in [0, 1), got {rate}")
    present = torch.rand(count, len(VIEWS), generator=generator) >= rate
    kept = torch.randint(len(VIEWS), (count, 1), generator=generator)
    alone = torch.zeros_like(present).scatter(1, kept, True)
    return torch.where(present.any(1, keepdim=True), present, alone)

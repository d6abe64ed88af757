"""Severity: how badly images are degraded, read from their pixels alone.

In the place of the CLIP scores of "MoR", arXiv 2511.16024. The noise is estimated as in Immerkaer, "Fast Noise Variance
Estimation", Computer Vision and Image Understanding 64(2), 1996.
Differs: three numbers by formula, no network.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.errors import UserError

__all__ = ["estimate_severity"]

NOISE = (0.02, 0.2)
"""The standard deviations of noise that count as 0 and 1."""

_HIGH_PASS = ((1.0, -2.0, 1.0), (-2.0, 4.0, -2.0), (1.0, -2.0, 1.0))
_LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


@torch.no_grad()
def estimate_severity(images: Tensor) -> Tensor:
    r"""Noise, blur and loss of contrast of images (B, C, H, W) with values in [0, 1]: (B, 3), each in [0, 1].

    - Noise: :math:`\hat\sigma = \sqrt{\pi/2}\,\mathrm{mean}|I * N| / 6`, N the difference of two Laplacians, which sees
      neither planes nor edges along the axes; 0 up to 0.02, 1 from 0.2.
    - Blur: :math:`1 / (1 + V_L / V)`, V the variance of the image and :math:`V_L` that of its Laplacian, both less what
      noise of that :math:`\hat\sigma` adds (1 and 20 times its square).
    - Loss of contrast: :math:`1 - 2 \sqrt V`; half black, half white has 0.

    Means are over positions and channels. They are rough: fine texture counts as noise, a plain image as blurred.

    Raises:
        UserError: no images (B, C, H, W) of floating point, or smaller than 3 x 3.

    >>> step = (torch.arange(16) >= 8).float().expand(1, 1, 16, 16)
    >>> estimate_severity(step)[0, [0, 2]].tolist()  # no noise, full contrast
    [0.0, 0.0]
    """
    if images.dim() != 4 or not images.is_floating_point() or min(images.shape[2:]) < 3:
        raise UserError(
            f"estimate_severity: takes images (B, C, H, W) of at least 3 x 3 in floating point, got {images.dtype} "
            f"{[*images.shape]}"
        )
    values = images.to(torch.promote_types(images.dtype, torch.float32))
    sigma = math.sqrt(math.pi / 2) / 6 * _filtered(values, _HIGH_PASS).abs().flatten(1).mean(1)
    centred = values - values.mean((2, 3), keepdim=True)
    variance = (centred.square().flatten(1).mean(1) - sigma.square()).clamp_min(0)
    edges = (_filtered(values, _LAPLACIAN).square().flatten(1).mean(1) - 20 * sigma.square()).clamp_min(0)
    least = torch.finfo(values.dtype).tiny
    noise = (sigma - NOISE[0]) / (NOISE[1] - NOISE[0])
    blur = (variance + least) / (variance + edges + least)
    return torch.stack([noise, blur, 1 - 2 * variance.sqrt()], 1).clamp(0, 1)


def _filtered(images: Tensor, kernel: tuple[tuple[float, ...], ...]) -> Tensor:
    """Each channel of images (B, C, H, W) with a kernel (3, 3), at the positions where it fits."""
    channels = images.shape[1]
    weight = images.new_tensor(kernel).expand(channels, 1, 3, 3)
    return F.conv2d(images, weight, groups=channels)

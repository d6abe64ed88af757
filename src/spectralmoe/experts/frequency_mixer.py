"""FrequencyMixer: a module that mixes channels frequency by frequency.

"Frequency-Assisted Mamba for Remote Sensing Image Super-Resolution" (FMSR), arXiv 2405.04964: the frequency selection
module. Authors' code has no licence; written from the equation.
Differs: the transforms are scaled to keep the norm, so that the effect of the GELU does not depend on the size of a
map; it takes signals, too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.errors import UserError, check_whole

__all__ = ["FrequencyMixer"]


class FrequencyMixer(nn.Module):
    r"""Mixes the channels of maps x (M, C, H, W) or signals (M, C, T) in frequency space.

    .. math:: y = \mathcal{F}^{-1}(V_2\, g(V_1 \mathcal{F} x))

    V_1 and V_2 are complex (C, C) and the same at every frequency; g is a GELU of the real and of the imaginary part.
    Only g mixes positions: without it, and with real V, this is a convolution of size 1. g does not commute with
    shifts, so the output of a shifted map is not the shifted output. It is computed in float32 or more, without
    autocast.

    Args:
        channels: C.
        gelu: whether there is a GELU; without one, g is the identity.

    Attributes:
        first, second: V_1 and V_2, each (2, C, C), real and imaginary part.

    Raises:
        UserError: channels is below 1. In forward: the rows are neither maps nor signals.

    >>> FrequencyMixer(8)(torch.randn(2, 8, 6, 5)).shape
    torch.Size([2, 8, 6, 5])
    """

    def __init__(self, channels: int, *, gelu: bool = True) -> None:
        super().__init__()
        check_whole("FrequencyMixer", "channels", channels)
        self.channels, self.gelu = channels, gelu
        self.first, self.second = (
            nn.Parameter(torch.randn(2, channels, channels) * (2 * channels) ** -0.5) for _ in "12"
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 3:
            raise UserError(
                f"FrequencyMixer takes maps (M, C, H, W) or signals (M, C, T), got rows of shape {tuple(x.shape)}; use "
                "unit=Sample()"
            )
        dims, sizes = list(range(2, x.dim())), list(x.shape[2:])
        with torch.autocast(x.device.type, enabled=False):
            spectrum = torch.fft.rfftn(x.to(torch.promote_types(x.dtype, torch.float32)), dim=dims, norm="ortho")
            parts = torch.cat([spectrum.real, spectrum.imag], 1).flatten(2)
            hidden = _real_form(self.first).to(parts.dtype) @ parts
            hidden = F.gelu(hidden) if self.gelu else hidden
            real, imaginary = (_real_form(self.second).to(parts.dtype) @ hidden).chunk(2, 1)
            mixed = torch.complex(real, imaginary).view_as(spectrum)
            y: Tensor = torch.fft.irfftn(mixed, s=sizes, dim=dims, norm="ortho").to(x.dtype)
            return y


def _real_form(matrix: Tensor) -> Tensor:
    """A complex matrix (2, C, C) as the real one (2C, 2C) that does the same to real above imaginary parts."""
    real, imaginary = matrix
    return torch.cat([torch.cat([real, -imaginary], 1), torch.cat([imaginary, real], 1)])

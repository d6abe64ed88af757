"""PatchMixer: a module that mixes a map within windows.

Zamfir et al., "Complexity Experts are Task-Discriminative Learners for Any Image Restoration" (MoCE-IR), arXiv
2411.18466, section 3: the expert. Authors' code: github.com/eduardzamfir/MoCE-IR; written from the equations.
Differs: the gating branch s is computed from the expert's own map and not shared. The norm has no weights. A map
smaller than the window is one window; other maps are padded with zeros to whole windows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.errors import UserError, check_whole

__all__ = ["PatchMixer", "circular_convolution"]


class PatchMixer(nn.Module):
    r"""Maps x (M, C, H, W) to maps of the same shape through R channels, which it mixes within windows.

    .. math:: [h, s] = W_1 x, \quad [q, k, v] = W_2 h, \quad
              y = W_3 \big(\mathrm{LN}(q \circledast k) \odot v \odot \mathrm{silu}(s)\big)

    :math:`\circledast` is the circular convolution within each window, by Fourier transforms in float32 or more. The
    matrices W act on channels alone, and LN is over channels. The size of the window changes the receptive field and
    the cost, not the parameters.

    Args:
        dim: C.
        rank: R, at least 2. The authors double it from expert to expert, from C/8 to C.
        window: the side of a window in pixels; the authors' experts have 4, 8, 16 and 32.

    Raises:
        UserError: a size is too small. In forward: the rows are no maps.

    >>> PatchMixer(8, rank=4, window=4)(torch.randn(2, 8, 6, 10)).shape
    torch.Size([2, 8, 6, 10])
    """

    def __init__(self, dim: int, rank: int, window: int) -> None:
        super().__init__()
        for name, value, least in (("dim", dim, 1), ("rank", rank, 2), ("window", window, 1)):
            check_whole("PatchMixer", name, value, least)
        self.dim, self.rank, self.window = dim, rank, window
        self.into = nn.Conv2d(dim, 2 * rank, 1)
        self.parts = nn.Conv2d(rank, 3 * rank, 1)
        self.back = nn.Conv2d(rank, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise UserError(
                f"PatchMixer takes maps (M, C, H, W), got rows of shape {tuple(x.shape)}; use unit=Sample()"
            )
        inner, gate = self.into(x).chunk(2, 1)
        query, key, value = self.parts(inner).chunk(3, 1)
        mixed = circular_convolution(query, key, self.window)
        normed = F.layer_norm(mixed.movedim(1, -1), (self.rank,)).movedim(-1, 1).to(value.dtype)
        y: Tensor = self.back(normed * value * F.silu(gate))
        return y


def circular_convolution(a: Tensor, b: Tensor, window: int) -> Tensor:
    r"""Compute the circular convolution :math:`c_i = \sum_j a_j b_{i - j}` of maps (M, C, H, W) within each window.

    Args:
        window: the side of a window in pixels; a map that is smaller is one window.

    >>> ones = torch.ones(1, 1, 4, 4)
    >>> circular_convolution(ones, ones, 2)[0, 0, 0].round().tolist()
    [4.0, 4.0, 4.0, 4.0]
    """
    height, width = a.shape[-2:]
    sides = min(window, height), min(window, width)
    padding = (0, -width % sides[1], 0, -height % sides[0])
    precise = torch.promote_types(a.dtype, torch.float32)
    spectra = [torch.fft.rfft2(_windows(F.pad(each.to(precise), padding), sides)) for each in (a, b)]
    mixed: Tensor = torch.fft.irfft2(spectra[0] * spectra[1], s=sides)  # (M, C, H/h, W/w, h, w)
    return mixed.transpose(3, 4).flatten(4, 5).flatten(2, 3)[..., :height, :width]


def _windows(maps: Tensor, sides: tuple[int, int]) -> Tensor:
    """Maps (M, C, H, W) as windows (M, C, H/h, W/w, h, w)."""
    rows, columns = maps.shape[2] // sides[0], maps.shape[3] // sides[1]
    return maps.reshape(*maps.shape[:2], rows, sides[0], columns, sides[1]).transpose(3, 4)

"""Convolutional experts, which run on whole maps.

One choice an image, as in Zamfir et al., "Complexity Experts are Task-Discriminative Learners for Any Image
Restoration" (MoCE-IR), arXiv 2411.18466.
Differs: all experts are alike, two plain convolutions each.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.errors import UserError
from spectralmoe.experts.base import Experts

__all__ = ["ConvExperts"]


class ConvExperts(Experts):
    r"""Holds E networks of two convolutions, :math:`W_2 * \mathrm{gelu}(W_1 * x + b_1) + b_2`, on maps x (C, H, W).

    An output has the size of its map; the convolutions pad it with zeros. Only the experts that a map chose run on it.
    Use it in ``MoE(..., unit=Sample())``. Weights start as in ``nn.Conv2d``.

    Args:
        channels: C.
        hidden: the number of channels between the convolutions.
        kernel_size: the odd side k of the kernels.

    Attributes:
        up: (E, hidden, C, k, k).
        down: (E, C, hidden, k, k).
        up_bias, down_bias: (E, hidden) and (E, C).

    Raises:
        UserError: a size is below 1, or ``kernel_size`` is even.

    >>> bank = ConvExperts(2, channels=3, hidden=8)
    >>> x = torch.randn(5, 3, 6, 6)
    >>> y = bank(x, counts=torch.tensor([3, 2]))
    >>> torch.allclose(y[3:], bank.expert(x[3:], 1), atol=1e-6)
    True
    """

    row_dims = 3

    def __init__(self, num_experts: int, channels: int, hidden: int, *, kernel_size: int = 3) -> None:
        super().__init__(num_experts)
        if channels < 1 or hidden < 1:
            raise UserError(f"ConvExperts: channels and hidden must be at least 1, got {channels} and {hidden}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"ConvExperts: kernel_size must be odd, so that maps keep their size, got {kernel_size}")
        self.channels, self.width, self.kernel_size = channels, hidden, kernel_size
        self.up, self.up_bias = _kernels(num_experts, hidden, channels, kernel_size)
        self.down, self.down_bias = _kernels(num_experts, channels, hidden, kernel_size)

    def spec_arguments(self) -> dict[str, object]:
        """Return the constructor arguments that are not attributes of the same name."""
        return {"hidden": self.width}

    def expert(self, x: Tensor, e: int) -> Tensor:
        hidden = F.gelu(self._convolve(x, self.up[e], self.up_bias[e]))
        return self._convolve(hidden, self.down[e], self.down_bias[e])

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        return self.project(self.hidden(x, counts), counts)

    def hidden(self, x: Tensor, counts: Tensor) -> Tensor:
        return F.gelu(self._each(x, self.up, self.up_bias, counts))

    def project(self, hidden: Tensor, counts: Tensor) -> Tensor:
        return self._each(hidden, self.down, self.down_bias, counts)

    def reads_loads(self, x: Tensor) -> bool:
        return True

    def expert_parameters(self, e: int) -> dict[str, Tensor]:
        return {name: parameter[e] for name, parameter in self.named_parameters(recurse=False)}

    def costs(self, shape: Sequence[int] = ()) -> Tensor:
        """Return the operations of each expert (E,) on a map of ``shape`` (C, H, W); by default on one pixel."""
        return super().costs() * prod(shape[1:])

    def _each(self, x: Tensor, weight: Tensor, bias: Tensor, counts: Tensor) -> Tensor:
        """The maps of each expert, convolved with its kernels; zeros for maps that belong to no expert."""
        sizes = counts.tolist()
        *blocks, rest = x.split([*sizes, x.shape[0] - sum(sizes)])
        maps = [self._convolve(*part) for part in zip(blocks, weight.unbind(), bias.unbind(), strict=True)]
        return torch.cat([*maps, x.new_zeros(len(rest), weight.shape[1], *x.shape[2:], dtype=maps[0].dtype)])

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=self.kernel_size // 2)


def _kernels(num_experts: int, out: int, channels: int, size: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Kernels (E, out, channels, size, size) and biases (E, out), uniform as ``nn.Conv2d`` starts."""
    bound = (channels * size**2) ** -0.5
    shapes = (num_experts, out, channels, size, size), (num_experts, out)
    kernels, biases = (nn.Parameter(torch.empty(shape).uniform_(-bound, bound)) for shape in shapes)
    return kernels, biases

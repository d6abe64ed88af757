"""A small classifier of signals that routes each signal as a whole, to a small expert or to a large one.

After "PhyG-MoE", arXiv 2601.12798, abstract: light experts for elementary signals, a large one on demand, chosen by the
spectrum. Differs: the authors' large expert is a TransNeXt, of which the abstract says no more; here all experts are
convolutions that differ in width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.context import Context
from spectralmoe.errors import UserError
from spectralmoe.experts import HeterogeneousExperts
from spectralmoe.models.build import ExpertsFactory, RouterFactory, layers_of
from spectralmoe.moe import MoE
from spectralmoe.router import Router
from spectralmoe.scorers import SpectrumScorer
from spectralmoe.selectors import TopK
from spectralmoe.units import Sample

__all__ = ["SignalBlock", "SignalExpert", "SignalMoE", "signal_experts", "signal_moe", "spectrum_router"]

WINDOW, HOP, SHORTEST = 64, 16, 80
_LIGHTEST = 1 / 8
_EPS = 1e-6


class SignalExpert(nn.Sequential):
    """An expert of three 3 x 3 convolutions with ``hidden`` channels inside, on maps (M, C, H, W)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(hidden, channels, 3, padding=1),
        )
        self.channels, self.hidden = channels, hidden


class SignalBlock(nn.Module):
    r"""A block with an MoE layer of whole maps z (B, C, H, W): :math:`z \leftarrow z + \mathrm{MoE}(\mathrm{norm}(z))`.

    Args:
        moe: an MoE layer with ``unit=Sample()``; its parts may read the signals (B, T) as "map".
    """

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.norm, self.moe = nn.GroupNorm(1, moe.router.scorer.dim), moe

    def forward(self, z: Tensor, context: Context) -> Tensor:
        routed: Tensor = self.moe(self.norm(z), context=context)
        return z + routed


class SignalMoE(nn.Module):
    """A classifier that maps signals (B, T), complex or real, to logits (B, num_classes). ``signal_moe`` builds one.

    It computes the logarithm of a spectrogram (Hann windows of 64 samples, every 16 samples), standardises it for each
    signal, and applies two strided convolutions, the blocks, and a linear head on the mean and the maximum of each
    channel.

    Args:
        blocks: the blocks, all with C channels.
        num_classes: the number of logits.

    Raises:
        UserError: there is no block. In forward: the signals are not (B, T), or shorter than 80 samples. With fewer,
            the second convolution would write one column; in bfloat16 on CPUs with AMX torch then reads memory that
            was never written, and the logits are NaN.

    >>> signal_moe(21, width=8, hidden=16)(torch.randn(3, 256, dtype=torch.complex64)).shape
    torch.Size([3, 21])
    """

    def __init__(self, blocks: Sequence[SignalBlock], num_classes: int) -> None:
        super().__init__()
        if not blocks:
            raise UserError("SignalMoE: depth must be at least 1")
        width = blocks[0].moe.router.scorer.dim
        inside = max(width // 2, 1)
        self.stem = nn.Sequential(
            nn.Conv2d(1, inside, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(inside, width, 3, stride=2, padding=1),
        )
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.GroupNorm(1, width), nn.Linear(2 * width, num_classes)
        self.num_classes = num_classes

    def forward(self, signals: Tensor) -> Tensor:
        z, context = self.stem(self.spectrogram(signals)), Context(samples={"map": signals})
        for block in self.blocks:
            z = block(z, context)
        values = self.norm(z).flatten(2)
        logits: Tensor = self.head(torch.cat([values.mean(2), values.amax(2)], 1))
        return logits

    def spectrogram(self, signals: Tensor) -> Tensor:
        """Return log powers (B, 1, 64, T // 16) of signals (B, T), with mean 0 and variance 1 for each signal."""
        if signals.dim() != 2 or signals.shape[1] < SHORTEST:
            raise UserError(
                f"SignalMoE reads signals (B, T) of at least {SHORTEST} samples, got a tensor of shape "
                f"{tuple(signals.shape)}"
            )
        x = signals if signals.is_complex() else torch.complex(signals.float(), torch.zeros_like(signals).float())
        window = torch.hann_window(WINDOW, device=x.device, dtype=x.real.dtype)
        lines = torch.stft(x, WINDOW, HOP, window=window, pad_mode="constant", onesided=False, return_complex=True)
        power = torch.view_as_real(lines[..., : x.shape[1] // HOP]).square().sum(-1)
        level = (power + _EPS).log10().to(self.norm.weight.dtype)
        return F.layer_norm(level, level.shape[1:])[:, None]


def spectrum_router(dim: int, num_experts: int) -> Router:
    """Make a router that reads the spectrum of the signal and chooses one expert."""
    return Router(SpectrumScorer(dim, num_experts), TopK(1))


def signal_experts(num_experts: int, channels: int, hidden: int) -> HeterogeneousExperts:
    """Make experts whose widths go from ``hidden`` / 8 to ``hidden`` in equal ratios; a single one has ``hidden``.

    >>> [expert.hidden for expert in signal_experts(4, 16, 64).experts]
    [8, 16, 32, 64]
    """
    steps = [1 - e / max(num_experts - 1, 1) for e in range(num_experts)] if num_experts > 1 else [0.0]
    widths = [max(round(hidden * _LIGHTEST**step), 1) for step in steps]
    return HeterogeneousExperts([SignalExpert(channels, width) for width in widths])


def signal_moe(
    num_classes: int,
    *,
    width: int = 16,
    depth: int = 1,
    num_experts: int = 2,
    hidden: int = 64,
    router: RouterFactory = spectrum_router,
    experts: ExpertsFactory = signal_experts,
) -> SignalMoE:
    """Build a ``SignalMoE`` of ``depth`` equal blocks.

    With the same seed, two networks that differ only in their routers start with the same other weights, because the
    routers' draws leave torch's random generator as it was.

    Args:
        num_classes: the number of logits.
        width, depth, num_experts, hidden: C, the number of blocks, E, H.
        router: a function (C, E) -> router; the default is ``spectrum_router``.
        experts: a function (E, C, H) -> bank of experts on maps; the default is ``signal_experts``.
    """
    banks = [experts(num_experts, width, hidden) for _ in range(depth)]
    layers = layers_of(banks, router, width, num_experts, unit=Sample())
    return SignalMoE([SignalBlock(layer) for layer in layers], num_classes)

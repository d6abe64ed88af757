"""Degradations of photographs with a known severity: noise, blur, haze, rain, and mixtures of two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.errors import UserError

__all__ = ["DEGRADATIONS", "KINDS", "MIXTURE", "Pairs", "blur", "degrade", "draw_severity", "haze", "noise", "rain"]

AIR, STREAK, BRIGHTNESS = 0.9, 9, 0.2
_RADIUS = 9
"""Of the blur's kernel: three times its largest width."""


def noise(images: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    r"""Gaussian noise: :math:`y = x + \sigma n`, :math:`\sigma = 0.02 + 0.18 v`, n standard normal at each pixel."""
    drawn = torch.randn(images.shape, generator=generator)
    return images + (0.02 + 0.18 * _each(severity)) * drawn.to(images)


def blur(images: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    r"""Gaussian blur: :math:`y = x * g_\sigma`, :math:`\sigma = 1 + 2 v` pixels; g ends 9 pixels from its middle, and
    the image is mirrored at its border.
    """
    steps = torch.arange(-_RADIUS, _RADIUS + 1).to(images)
    kernel = torch.softmax(-0.5 * (steps / (1 + 2 * severity[:, None])) ** 2, 1)
    padded = F.pad(images, [_RADIUS] * 4, mode="reflect").transpose(0, 1)
    once = F.conv2d(padded, kernel[:, None, None, :], groups=len(images))
    return F.conv2d(once, kernel[:, None, :, None], groups=len(images)).transpose(0, 1)


def haze(images: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    r"""Haze: :math:`y = t x + 0.9 (1 - t)`, :math:`t = 1 - (0.2 + 0.7 v)\, r`, r falling evenly from 1 in the top row
    to 0 in the bottom row.
    """
    ramp = torch.linspace(1, 0, images.shape[2]).to(images)[:, None]
    through = 1 - (0.2 + 0.7 * _each(severity)) * ramp
    return through * images + AIR * (1 - through)


def rain(images: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    r"""Rain: :math:`y = x + 0.2 s`, s = 1 on streaks and 0 beside them. A streak begins at each pixel with probability
    :math:`0.01 + 0.05 v` and covers 9 pixels along the diagonal, down to the right.
    """
    height, width = images.shape[2:]
    drawn = torch.rand(len(images), 1, height + STREAK - 1, width + STREAK - 1, generator=generator)
    begins = (drawn.to(images) < 0.01 + 0.05 * _each(severity)).to(images.dtype)
    covered = F.conv2d(begins, torch.eye(STREAK).to(images)[None, None]) > 0.5
    return images + BRIGHTNESS * covered.to(images.dtype)


DEGRADATIONS: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "blur": blur,
    "haze": haze,
    "rain": rain,
    "noise": noise,
}
"""Name -> (images (N, 1, H, W), severity (N,), generator) -> degraded ones; a mixture runs them in this order, that in
which they come about between scene and sensor."""

MIXTURE = "mixture"
KINDS = (*DEGRADATIONS, MIXTURE)
"""What a sample may be: degraded in one way, or a mixture of two."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Degraded images beside the true ones.

    Attributes:
        images, truths: (N, 1, H, W) in [0, 1].
        severity: (N, 4), one number for each of ``DEGRADATIONS``: 0 where it is absent, else in (0, 1].
        kinds: (N,) int64, places in ``KINDS``.
    """

    images: Tensor
    truths: Tensor
    severity: Tensor
    kinds: Tensor

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, chosen: Tensor | slice) -> Pairs:
        return Pairs(self.images[chosen], self.truths[chosen], self.severity[chosen], self.kinds[chosen])

    def part(self, chosen: slice, device: torch.device) -> Pairs:
        """Some of the pairs, on ``device``."""
        there = self[chosen]
        return Pairs(*(t.to(device) for t in (there.images, there.truths, there.severity, there.kinds)))

    @classmethod
    def of(cls, truths: Tensor, kinds: Sequence[str], seed: int) -> Pairs:
        """Each image (N, 1, H, W) degraded in one of ``kinds``, in turns, everything random under ``seed``.

        >>> pairs = Pairs.of(torch.rand(6, 1, 16, 16), ["noise", "mixture"], seed=0)
        >>> [KINDS[kind] for kind in pairs.kinds], (pairs.severity > 0).sum(1).tolist()
        (['noise', 'mixture', 'noise', 'mixture', 'noise', 'mixture'], [1, 2, 1, 2, 1, 2])
        """
        generator = torch.Generator().manual_seed(seed)
        places = torch.tensor([KINDS.index(kind) for kind in kinds])[torch.arange(len(truths)) % len(kinds)]
        severity = draw_severity(places, generator)
        return cls(degrade(truths, severity, generator), truths, severity, places)


def draw_severity(kinds: Tensor, generator: torch.Generator) -> Tensor:
    """Severities (N, 4), uniform in (0, 1] for what each of ``kinds`` (N,) has: a mixture any two of them."""
    count, ways = len(kinds), len(DEGRADATIONS)
    values = 1 - torch.rand(count, ways, generator=generator)
    pairs = torch.rand(count, ways, generator=generator).topk(2).indices
    mixed = torch.zeros(count, ways, dtype=torch.bool).scatter(1, pairs, True)
    single = kinds[:, None] == torch.arange(ways)
    return torch.where(kinds[:, None] == KINDS.index(MIXTURE), mixed, single) * values


def degrade(images: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, 1, H, W) in [0, 1], degraded with ``severity`` (N, 4) and cut to [0, 1]; 0 leaves a degradation out.

    Raises:
        UserError: images of another shape, or with a side of 9 pixels or less; severities that do not fit them.

    >>> images = torch.rand(2, 1, 16, 16)
    >>> severity = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])  # the second gets noise
    >>> same = (degrade(images, severity, torch.Generator().manual_seed(0)) == images).flatten(1).all(1)
    >>> same.tolist()
    [True, False]
    """
    if images.dim() != 4 or images.shape[1] != 1 or min(images.shape[2:]) <= _RADIUS:
        raise UserError(f"degrade: takes grey images (N, 1, H, W) above {_RADIUS} x {_RADIUS}, got {[*images.shape]}")
    if severity.shape != (len(images), len(DEGRADATIONS)):
        raise UserError(
            f"degrade: severity of {len(images)} images is ({len(images)}, {len(DEGRADATIONS)}), one column for each "
            f"of {', '.join(DEGRADATIONS)}; got {[*severity.shape]}"
        )
    degraded = images.clone()
    for place, change in enumerate(DEGRADATIONS.values()):
        has = (severity[:, place] > 0).nonzero().flatten()
        if len(has):
            degraded[has] = change(degraded[has], severity[has, place], generator)
    return degraded.clamp(0, 1)


def _each(severity: Tensor) -> Tensor:
    return severity[:, None, None, None]

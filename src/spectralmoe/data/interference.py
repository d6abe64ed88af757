r"""Records of radio interference, made from equations: 21 classes of one or two jammers in noise.

Complex baseband, frequencies in cycles a sample. "PhyG-MoE", arXiv 2601.12798, has 21 classes of interference to
satellite navigation, but its data are not public; primitives, pairs and ranges here are ours, after signal models of
that literature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectralmoe.errors import UserError

__all__ = ["CLASSES", "PRIMITIVES", "Interference", "synthetic_interference"]

_Complex = NDArray[np.complex128]
_SHORTEST = 128
_APART = 6.0  # dB, how far the powers of two jammers differ at most
_BAND = 0.45  # the highest frequency of a tone


@dataclass(frozen=True, slots=True)
class Interference:
    """Records with what is in them.

    Attributes:
        signals: (N, T) complex64.
        labels: (N,) int64, places in ``CLASSES``.
        jnr: (N,), power of the jammers over that of the noise, in dB.
    """

    signals: Tensor
    labels: Tensor
    jnr: Tensor

    @property
    def components(self) -> Tensor:
        """How many jammers are in each record (N,): 1 or 2."""
        return torch.tensor([len(jammers) for jammers in _MEMBERS])[self.labels]


def synthetic_interference(
    n: int, *, jnr: float | tuple[float, float] = (0.0, 20.0), seed: int, length: int = 1024
) -> Interference:
    r"""``n`` records of T = ``length`` samples, the classes in turn: :math:`x = 10^{J/20}\,j + w`.

    w is complex white noise of unit power, J the jammer-to-noise ratio in dB, uniform between the two of ``jnr``, and
    :math:`j = \sum_k 10^{d_k/20} j_k` scaled to unit power over the record: one jammer, or two whose powers differ by
    d = 0 and d uniform in -6 to 6 dB. The jammers, each of unit power over the record, frequencies in cycles a sample
    and phases uniform:

    - tone: :math:`e^{i(2\pi f t + \varphi)}`, \|f\| < 0.45; multitone: the sum of five.
    - chirp: frequency :math:`f_0 + B(\mathrm{frac}(t/P + s) - 1/2)`, a sawtooth of bandwidth B from 0.1 to 0.5 and
      period P from a tenth to all of the record, up or down.
    - pulse: a tone that is on for 10% to 40% of each period of a twentieth to a quarter of the record.
    - narrow-band noise, 0.05 wide, and partial-band noise, 0.5 wide: complex Gaussian lines inside the band.

    Classes are the six alone and the fifteen pairs.

    Args:
        jnr: the lowest and the highest J in dB, or one for all.
        seed: of all draws: the same on every machine up to rounding.

    Raises:
        UserError: n < 1, a length below 128, or a jnr that is no range of finite numbers.

    >>> data = synthetic_interference(42, jnr=10.0, seed=0, length=256)
    >>> tuple(data.signals.shape), CLASSES[int(data.labels[7])], int(data.components[7])
    ((42, 256), 'tone + chirp', 2)
    """
    low, high = (jnr, jnr) if isinstance(jnr, int | float) else jnr
    if n < 1 or length < _SHORTEST:
        raise UserError(f"synthetic_interference: n must be at least 1 and length {_SHORTEST}, got {n} and {length}")
    if not (np.isfinite([low, high]).all() and low <= high):
        raise UserError(f"synthetic_interference: jnr must be a range of finite dB, lowest first, got {jnr}")
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % len(CLASSES)
    ratio = draw.uniform(low, high, n)
    total = np.zeros((n, length), np.complex128)
    for kind, make in enumerate(_MAKERS.values()):
        holds = np.array([kind in members for members in _MEMBERS])[labels]
        second = np.array([kind == members[-1] and len(members) == 2 for members in _MEMBERS])[labels]
        apart = np.where(second, draw.uniform(-_APART, _APART, n), 0.0)
        total[holds] += 10 ** (apart[holds, None] / 20) * _unit(make(int(holds.sum()), length, draw))
    x = 10 ** (ratio[:, None] / 20) * _unit(total) + _white(n, length, draw)
    return Interference(
        torch.from_numpy(x.astype(np.complex64)), torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(ratio)
    )


def _unit(x: _Complex) -> _Complex:
    """Each row scaled to unit power."""
    scaled: _Complex = x / np.sqrt(np.mean(np.abs(x) ** 2, axis=1, keepdims=True))
    return scaled


def _white(n: int, length: int, draw: np.random.Generator) -> _Complex:
    """Complex Gaussian noise of unit power."""
    parts = draw.standard_normal((2, n, length))
    noise: _Complex = (parts[0] + 1j * parts[1]) / np.sqrt(2)
    return noise


def _tone(n: int, length: int, draw: np.random.Generator) -> _Complex:
    frequency, phase = draw.uniform(-_BAND, _BAND, (n, 1)), draw.uniform(0, 2 * np.pi, (n, 1))
    tone: _Complex = np.exp(1j * (2 * np.pi * frequency * np.arange(length) + phase))
    return tone


def _multitone(n: int, length: int, draw: np.random.Generator, tones: int = 5) -> _Complex:
    total: _Complex = np.sum([_tone(n, length, draw) for _ in range(tones)], axis=0)
    return total


def _chirp(n: int, length: int, draw: np.random.Generator) -> _Complex:
    period, start = draw.uniform(0.1, 1.0, (n, 1)) * length, draw.uniform(0, 1, (n, 1))
    width = draw.uniform(0.1, 0.5, (n, 1)) * draw.choice([-1.0, 1.0], (n, 1))
    centre = draw.uniform(-1, 1, (n, 1)) * (0.5 - np.abs(width) / 2)
    frequency = centre + width * ((np.arange(length) / period + start) % 1.0 - 0.5)
    phase = draw.uniform(0, 2 * np.pi, (n, 1))
    chirp: _Complex = np.exp(1j * (2 * np.pi * np.cumsum(frequency, axis=1) + phase))
    return chirp


def _pulse(n: int, length: int, draw: np.random.Generator) -> _Complex:
    period, duty = draw.uniform(0.05, 0.25, (n, 1)) * length, draw.uniform(0.1, 0.4, (n, 1))
    on = (np.arange(length) / period + draw.uniform(0, 1, (n, 1))) % 1.0 < duty
    pulse: _Complex = _tone(n, length, draw) * on
    return pulse


def _band_noise(width: float) -> Callable[[int, int, np.random.Generator], _Complex]:
    def make(n: int, length: int, draw: np.random.Generator) -> _Complex:
        centre = draw.uniform(-1, 1, (n, 1)) * (0.5 - width / 2)
        inside = np.abs(np.fft.fftfreq(length) - centre) <= width / 2
        noise: _Complex = np.fft.ifft(_white(n, length, draw) * inside, axis=1)
        return noise

    return make


_MAKERS: dict[str, Callable[[int, int, np.random.Generator], _Complex]] = {
    "tone": _tone,
    "multitone": _multitone,
    "chirp": _chirp,
    "pulse": _pulse,
    "narrow-band noise": _band_noise(0.05),
    "partial-band noise": _band_noise(0.5),
}
PRIMITIVES = tuple(_MAKERS)
_MEMBERS: Sequence[tuple[int, ...]] = [
    *((kind,) for kind in range(len(PRIMITIVES))),
    *combinations(range(len(PRIMITIVES)), 2),
]
CLASSES = tuple(" + ".join(PRIMITIVES[kind] for kind in members) for members in _MEMBERS)
"""The six jammers alone, then the fifteen pairs."""

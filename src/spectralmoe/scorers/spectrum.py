"""Spectrum gate: the power spectrum of a sample, an image or a signal, chooses the experts.

Spectral features as a routing signal, after Xiao, Yuan, Jiang, Chen, Zhang & Lin, "Frequency-Assisted Mamba for Remote
Sensing Image Super-Resolution" (FMSR), arXiv 2405.04964, section III, which has no router, and after the gate of
"PhyG-MoE", arXiv 2601.12798, abstract, which reads "spectral feature entanglement" and does not say how.
Differs: the features are ours. They are powers alone, without phase: real and imaginary parts by themselves, as FMSR
has them, change when the map is shifted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.context import Rows
from spectralmoe.errors import UserError, check_whole
from spectralmoe.scorers.base import Scorer

__all__ = ["SpectrumScorer", "power_spectrum", "spectrum_features"]

_SHAPE, _STATISTICS = 4, 4  # numbers that describe the shape of the spectrum, and the values
_FLOOR = 1e-6  # power of a band below which nothing is told apart: 60 dB below unit power


class SpectrumScorer(Scorer):
    r"""Scores experts by the power spectrum of a map or signal m, which comes as side information (``Context``).

    .. math::
        s = C\,\mathrm{gelu}(V\,\mathrm{LN}(\phi(m)) + a) + b

    V is (H, F), C (E, H), a (H,) and b (E,). :math:`\phi` (N, F) are the features of ``spectrum_features``: log powers
    of frequency bands, entropy, flatness, peak and occupied share of the spectrum, and with ``statistics`` four numbers
    of the values themselves. A circular shift of m does not change them, nor does the global phase of a complex signal;
    without ``statistics`` a constant added to m does not either. With ``token=True``, :math:`x W^\top` is added,
    W (E, D).

    In a layer of tokens, m is given once for each sample, ``Context(samples={"map": m})``, and its spectrum is computed
    for each of the sample's tokens.

    Args:
        bands: how many bands of equal width divide the frequencies; frequency 0 is in none.
        hidden: H; with 0, C (E, F) reads the normalised features themselves.
        statistics: whether the mean, power, kurtosis and variation of the values are read as well.
        token: whether the token x is read as well.
        key: the name of m in ``Context``: (N, T) or (N, C, T) signals, or (N, C, H, W) maps, real or complex.

    Raises:
        UserError: an argument is out of range. In forward: the context has no m, or m is no map or signal of at least
            two values.

    >>> from spectralmoe import Context, FeedForward, MoE, Router, TopK
    >>> layer = MoE(Router(SpectrumScorer(16, 4), TopK(1)), FeedForward(4, dim=16, hidden=8))
    >>> x, maps = torch.randn(2, 5, 16), torch.rand(2, 3, 8, 8)
    >>> layer(x, context=Context(samples={"map": maps})).shape
    torch.Size([2, 5, 16])
    """

    rows = ("weight", "token_weight", "bias")

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        bands: int = 8,
        hidden: int = 32,
        statistics: bool = True,
        token: bool = False,
        key: str = "map",
    ) -> None:
        super().__init__(dim, num_experts)
        for name, value, least in (("bands", bands, 1), ("hidden", hidden, 0)):
            check_whole("SpectrumScorer", name, value, least)
        self.bands, self.hidden, self.statistics_read, self.token = bands, hidden, statistics, token
        self.key, self.reads = key, (key,)
        features = bands + _SHAPE + (_STATISTICS if statistics else 0)
        self.norm = nn.LayerNorm(features)
        self.up = nn.Linear(features, hidden) if hidden else None
        width = hidden or features
        self.weight = nn.Parameter(torch.randn(num_experts, width) * width**-0.5)
        self.token_weight = nn.Parameter(torch.randn(num_experts, dim) * dim**-0.5) if token else None
        self.bias = nn.Parameter(torch.zeros(num_experts))

    def spec_arguments(self) -> dict[str, object]:
        """Return the constructor arguments that are not attributes of the same name."""
        return {"statistics": self.statistics_read}

    def forward(self, x: Tensor, *, context: Rows | None = None) -> Tensor:
        features = self.features(self._values(context, x))
        scale, shift = self.norm.weight.to(x.dtype), self.norm.bias.to(x.dtype)
        features = F.layer_norm(features, features.shape[1:], scale, shift)
        if self.up is not None:
            features = F.gelu(F.linear(features, self.up.weight.to(x.dtype), self.up.bias.to(x.dtype)))
        logits = F.linear(features, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return logits if self.token_weight is None else logits + F.linear(x, self.token_weight.to(x.dtype))

    def features(self, maps: Tensor) -> Tensor:
        """Return the features (N, F) of maps (N, C, *S), before the normalisation."""
        return spectrum_features(maps, self.bands, statistics=self.statistics_read)

    @property
    def matrix(self) -> Tensor:
        """C, with W beside it if the token is read: (E, H) or (E, H + D)."""
        return self.weight if self.token_weight is None else torch.cat([self.weight, self.token_weight], 1)

    def _values(self, context: Rows | None, x: Tensor) -> Tensor:
        """The maps (N, C, *S) of the context, in the precision of x."""
        self.read(context, self.key, len(x))  # refuses what has no row for each token
        assert context is not None
        values = context[self.key]
        values = values.unsqueeze(1) if values.dim() == 2 else values
        if values.dim() not in (3, 4) or math.prod(values.shape[2:]) < 2:
            raise UserError(
                f"SpectrumScorer reads {self.key!r} as signals (N, T) or (N, C, T), or maps (N, C, H, W), of two "
                f"values or more; got the shape {tuple(context[self.key].shape)}"
            )
        return values.to(torch.promote_types(x.dtype, torch.complex64) if values.is_complex() else x.dtype)


def spectrum_features(x: Tensor, bands: int = 8, *, statistics: bool = True) -> Tensor:
    r"""Compute features (N, F) of the spectra of maps x (N, C, *S): F = ``bands`` + 4, and 4 more with ``statistics``.

    Let :math:`P_k` be the powers of ``power_spectrum`` at the n frequencies other than 0, and :math:`p = P/\sum P`.
    The features are, in this order:

    - the :math:`\log_{10}` of the power in each of B = ``bands`` rings of frequencies. Frequency k lies in ring
      :math:`\lfloor B |k|/k_{max} \rfloor`, and :math:`k_{max}` itself in the last; |k| is in cycles a sample, and
      :math:`k_{max}` is the frequency of a sign that changes at every step along every axis. Frequency 0 is in no ring,
      so the rings sum to the variance (Parseval);
    - the entropy :math:`-\sum p \log p/\log n`;
    - the flatness, the :math:`\log_{10}` of the geometric over the arithmetic mean of P;
    - the peak :math:`\log_{10}(n \max p)`;
    - the occupied share :math:`\log_{10}(1/(n \sum p^2))`: 0 for a flat spectrum, :math:`-\log_{10} n` for one line.

    With ``statistics`` follow four means over the channels, of the values themselves:

    - the mean of x, of complex x its absolute value;
    - the power, :math:`\log_{10}` of the variance v;
    - the kurtosis, :math:`\log_{10}` of the mean of :math:`|x - \bar x|^4/v^2`;
    - the variation, :math:`\log_{10}(1 + d)`, d the mean squared difference between neighbours (on a circle) of
      :math:`|x - \bar x|^2/v`.

    1e-6, which is -60 dB of unit power, is added to the power of each band, to the variance and, in equal parts for all
    frequencies, to the spectrum, so that no logarithm is infinite.

    >>> line = torch.cos(2 * torch.pi * torch.arange(64) / 8)[None, None]
    >>> entropy = spectrum_features(line)[0, 8]
    >>> bool(entropy < 0.2)
    True
    """
    powers, times, radius = power_spectrum(x)
    count = times.sum()
    logs = (_in_bands(powers * times, radius, bands) + _FLOOR).log10()
    level = powers + _FLOOR / count
    total = (level * times).sum(1, keepdim=True)
    share = level / total
    entropy = -(times * share * share.log()).sum(1) / count.log().clamp_min(1)
    flatness = (times * level.log10()).sum(1) / count - (total[:, 0] / count).log10()
    peak, occupied = (count * share.amax(1)).log10(), -(count * (times * share.square()).sum(1)).log10()
    features = [logs, torch.stack([entropy, flatness, peak, occupied], 1)]
    return torch.cat([*features, _statistics(x)] if statistics else features, 1)


def power_spectrum(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Compute the powers :math:`|\mathrm{fft}(x)_k|^2/n^2` of maps x (N, C, *S) of n values, a mean over channels.

    Returns:
        The powers (N, K) at all frequencies but 0; how often each counts (K,), which is twice where the mirrored
        frequency of a real map is left out; and :math:`|k|` (K,) as a share of the highest frequency.
    """
    shape, axes, options = x.shape[2:], tuple(range(2, x.dim())), {"dtype": x.real.dtype, "device": x.device}
    last = torch.fft.fftfreq(shape[-1], **options) if x.is_complex() else torch.fft.rfftfreq(shape[-1], **options)
    grid = [torch.fft.fftfreq(size, **options) for size in shape[:-1]] + [last]
    squares = sum(axis.square().view(-1, *[1] * (len(grid) - 1 - a)) for a, axis in enumerate(grid))
    assert isinstance(squares, Tensor)
    spectrum = torch.fft.fftn(x, dim=axes) if x.is_complex() else torch.fft.rfftn(x, dim=axes)
    powers = torch.view_as_real(spectrum).square().sum(-1).mean(1) / math.prod(shape) ** 2
    times = torch.ones_like(last)
    if not x.is_complex():
        times[1 : (shape[-1] + 1) // 2] = 2
    counted, radius = times.expand(squares.shape).flatten(), squares.flatten().sqrt() / (0.25 * len(shape)) ** 0.5
    return powers.flatten(1)[:, 1:], counted[1:], radius[1:]


def _in_bands(powers: Tensor, radius: Tensor, bands: int) -> Tensor:
    """The sums of powers (N, K) in each band of the radius (K,): (N, bands)."""
    place = (radius * bands + 1e-4).long().clamp(max=bands - 1)  # on an edge: the upper band in every precision
    return powers @ F.one_hot(place, bands).to(powers.dtype)


def _statistics(x: Tensor) -> Tensor:
    """Mean, power, kurtosis and variation of maps x (N, C, *S), a mean over channels of each: (N, 4)."""
    flat = x.flatten(2)
    mean = flat.mean(2, keepdim=True)
    power = _square(x - mean.view(*mean.shape[:2], *[1] * (x.dim() - 2)))
    variance = power.flatten(2).mean(2) + _FLOOR
    relative = power / variance.view(*variance.shape, *[1] * (x.dim() - 2))
    axes = range(2, x.dim())
    steps = sum((relative - relative.roll(1, axis)).square().flatten(2).mean(2) for axis in axes) / len(axes)
    assert isinstance(steps, Tensor)
    kurtosis = relative.square().flatten(2).mean(2) + _FLOOR
    level = (_square(mean) + _FLOOR**2).sqrt()[..., 0] if x.is_complex() else mean[..., 0]
    return torch.stack([level, variance.log10(), kurtosis.log10(), (1 + steps).log10()], 2).mean(1)


def _square(x: Tensor) -> Tensor:
    """|x|^2, real."""
    return torch.view_as_real(x).square().sum(-1) if x.is_complex() else x.square()

"""The frequency mixer against plain Fourier sums, and what its bend is and is not."""

from __future__ import annotations

import cmath
import math

import torch
from torch.nn import functional as F

from spectralmoe.experts import FrequencyMixer

C, H, W = 3, 4, 6


def slow(mixer, x):
    """y = F^-1(V2 g(V1 F x)) of one map (C, H, W) with the sums written out; the other half are conjugates."""
    first, second = (torch.complex(*matrix) for matrix in (mixer.first, mixer.second))

    def wave(p, q, sign):
        rows = [[cmath.exp(sign * 2j * math.pi * (p * i / H + q * j / W)) for j in range(W)] for i in range(H)]
        return torch.tensor(rows, dtype=torch.complex128) / math.sqrt(H * W)

    y = torch.zeros(C, H, W, dtype=torch.float64)
    for p in range(H):
        for q in range(W // 2 + 1):
            z = first @ (x.to(torch.complex128) * wave(p, q, -1)).sum((1, 2))
            z = second @ torch.complex(F.gelu(z.real), F.gelu(z.imag))
            twice = 1 if q in (0, W // 2) else 2
            y = y + twice * (z[:, None, None] * wave(p, q, 1)).real
    return y


def test_equation(same):
    mixer = FrequencyMixer(C).double()
    x = torch.randn(2, C, H, W, dtype=torch.float64, requires_grad=True)
    same(mixer(x), torch.stack([slow(mixer, one) for one in x]), [x, *mixer.parameters()])


def test_without_the_bend_and_with_real_matrices_it_is_a_convolution_of_size_1(close):
    mixer, x = FrequencyMixer(C, gelu=False).double(), torch.randn(2, C, H, W, dtype=torch.float64)
    with torch.no_grad():
        mixer.first[1] = mixer.second[1] = 0
    close(mixer(x), torch.einsum("oi,mihw->mohw", mixer.second[0] @ mixer.first[0], x))


def test_the_bend_alone_does_not_commute_with_shifts(close):
    x = torch.randn(1, C, H, W, dtype=torch.float64)
    for gelu in (False, True):
        mixer = FrequencyMixer(C, gelu=gelu).double()
        moved, mixed = mixer(x.roll((1, 2), (2, 3))), mixer(x).roll((1, 2), (2, 3))
        if gelu:
            assert (moved - mixed).abs().max() > 0.01
        else:
            close(moved, mixed)


def test_signals_16_bits_and_no_maps(close):
    mixer, x = FrequencyMixer(C), torch.randn(2, C, 7)
    close(mixer(x)[:, :, None], mixer(x[:, :, None]))
    with torch.autocast("cpu", torch.bfloat16):
        close(mixer(x), mixer(x.clone()))
        assert mixer(x).dtype == torch.float32
    assert mixer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert mixer.float()(x[:0]).shape == (0, C, 7)


def test_misuse(user_error):
    with user_error("FrequencyMixer", "channels", "0"):
        FrequencyMixer(0)
    with user_error("FrequencyMixer", "(5, 4)", "Sample"):
        FrequencyMixer(4)(torch.randn(5, 4))

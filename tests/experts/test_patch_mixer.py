"""The patch mixer against sums over the positions of each window."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from spectralmoe.experts import PatchMixer
from spectralmoe.experts.patch_mixer import circular_convolution


def convolved(a, b, window):
    """c_i = sum_j a_j b_(i - j), position by position, zeros behind the edges of the map."""
    height, width = a.shape[2:]
    h, w = min(window, height), min(window, width)
    a, b = (F.pad(each, (0, -width % w, 0, -height % h)) for each in (a, b))
    out = torch.zeros_like(a)
    for top in range(0, a.shape[2], h):
        for left in range(0, a.shape[3], w):
            for i in range(h):
                for j in range(w):
                    out[:, :, top + i, left + j] = sum(
                        a[:, :, top + u, left + v] * b[:, :, top + (i - u) % h, left + (j - v) % w]
                        for u in range(h)
                        for v in range(w)
                    )
    return out[:, :, :height, :width]


@pytest.mark.parametrize("window", [1, 2, 3, 8])
def test_it_is_a_circular_convolution_in_each_window(window, close):
    a, b = torch.randn(2, 2, 2, 4, 5, dtype=torch.float64)
    close(circular_convolution(a, b, window), convolved(a, b, window))


def test_equation(same):
    mixer = PatchMixer(3, rank=2, window=2).double()
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)

    def times(convolution, maps):
        return torch.einsum("oi,mihw->mohw", convolution.weight[:, :, 0, 0], maps) + convolution.bias[:, None, None]

    inner, gate = times(mixer.into, x).split(2, 1)
    query, key, value = times(mixer.parts, inner).split(2, 1)
    mixed = convolved(query, key, 2)
    normed = (mixed - mixed.mean(1, keepdim=True)) / (mixed.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    want = times(mixer.back, normed * value * gate / (1 + (-gate).exp()))
    same(mixer(x), want, [x, *mixer.parameters()])


def test_windows_do_not_hear_of_each_other():
    mixer, x = PatchMixer(3, rank=2, window=2), torch.randn(1, 3, 4, 4)
    far = x.clone()
    far[:, :, 2:, 2:] += 1
    assert not (mixer(far) - mixer(x))[:, :, :2].any()
    assert (PatchMixer(3, 2, 4)(far) - PatchMixer(3, 2, 4)(x))[:, :, :2].any()


def test_it_runs_in_16_bits_and_on_no_maps():
    mixer, x = PatchMixer(4, rank=2, window=3), torch.randn(2, 4, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert mixer(x).dtype == torch.bfloat16
    assert mixer.bfloat16()(x.bfloat16()).isfinite().all()
    assert mixer.float()(x[:0]).shape == (0, 4, 5, 5)


def test_misuse(user_error):
    with user_error("PatchMixer", "rank", "2", "1"):
        PatchMixer(4, 1, 4)
    with user_error("PatchMixer", "(M, C, H, W)", "(5, 4)", "Sample"):
        PatchMixer(4, 2, 4)(torch.randn(5, 4))
    with user_error("PatchMixer", "window", "0"):
        PatchMixer(4, 2, 0)

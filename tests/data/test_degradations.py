"""Degradations: the equations written again as loops, and severities that say what was done."""

from __future__ import annotations

import math

import torch
from seeds import generator

from spectralmoe.data.degradations import (
    DEGRADATIONS,
    KINDS,
    MIXTURE,
    Pairs,
    blur,
    degrade,
    draw_severity,
    haze,
    noise,
    rain,
)

SIDE = 12


def images_of(count=3):
    return torch.rand(count, 1, SIDE, SIDE, generator=generator(0), dtype=torch.float64)


def severity_of(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def mirrored(place):
    return abs(place) if place < SIDE else 2 * (SIDE - 1) - place


def test_blur_is_the_convolution_with_a_gaussian_written_as_a_loop():
    images, severity = images_of(2), severity_of(0.25, 1.0)
    want = []
    for image, v in zip(images[:, 0].tolist(), severity.tolist(), strict=True):
        weights = [math.exp(-0.5 * (k / (1 + 2 * v)) ** 2) for k in range(-9, 10)]
        total = sum(weights) ** 2
        pixels = [
            sum(
                down * right / total * image[mirrored(r + i - 9)][mirrored(c + j - 9)]
                for i, down in enumerate(weights)
                for j, right in enumerate(weights)
            )
            for r in range(SIDE)
            for c in range(SIDE)
        ]
        want.append(torch.tensor(pixels, dtype=torch.float64).view(1, SIDE, SIDE))
    close(blur(images, severity, generator(1)), torch.stack(want))


def test_haze_written_as_a_loop():
    images, severity = images_of(2), severity_of(0.5, 1.0)
    want = torch.zeros_like(images)
    for n, v in enumerate(severity.tolist()):
        for r in range(SIDE):
            t = 1 - (0.2 + 0.7 * v) * (1 - r / (SIDE - 1))
            want[n, 0, r] = t * images[n, 0, r] + 0.9 * (1 - t)
    torch.testing.assert_close(haze(images, severity, generator(1)), want, rtol=0, atol=1e-6)


def test_noise_grows_with_the_severity_alone():
    images = images_of(1)
    drawn = [(noise(images, severity_of(v), generator(1)) - images) / (0.02 + 0.18 * v) for v in (0.1, 0.5, 1.0)]
    close(drawn[0], drawn[1])
    close(drawn[0], drawn[2])
    close(drawn[0], torch.randn(images.shape, generator=generator(1)).double())


def test_rain_covers_nine_pixels_down_to_the_right_of_each_beginning():
    images, severity = images_of(2), severity_of(0.1, 1.0)
    begins = torch.rand(2, 1, SIDE + 8, SIDE + 8, generator=generator(1)).double()
    want = images.clone()
    for n, v in enumerate(severity.tolist()):
        for r in range(SIDE):
            for c in range(SIDE):
                if any(begins[n, 0, r + k, c + k] < 0.01 + 0.05 * v for k in range(9)):
                    want[n, 0, r, c] += 0.2
    close(rain(images, severity, generator(1)), want)
    assert (want > images).any()


def test_a_severity_of_zero_leaves_out_and_mixtures_run_in_the_order_of_the_table():
    images = images_of(3).float()
    severity = torch.zeros(3, 4)
    severity[1, 2], severity[2, :2] = 0.5, torch.tensor([0.5, 1.0])
    degraded = degrade(images, severity, generator(1))
    assert list(DEGRADATIONS) == ["blur", "haze", "rain", "noise"]
    assert torch.equal(degraded[0], images[0])
    both = haze(blur(images[2:], severity[2:, 0], generator(2)), severity[2:, 1], generator(2))
    torch.testing.assert_close(degraded[2:], both.clamp(0, 1))
    assert float(degraded.min()) >= 0
    assert float(degraded.max()) <= 1


def test_kinds_come_in_turns_and_a_mixture_has_two_degradations():
    pairs = Pairs.of(images_of(25).float(), KINDS, seed=3)
    assert pairs.kinds.bincount().tolist() == [5] * 5
    has = pairs.severity > 0
    assert torch.equal(has.sum(1), 1 + (pairs.kinds == KINDS.index(MIXTURE)).long())
    for place in range(4):
        assert bool(has[pairs.kinds == place, place].all())
    assert float(pairs.severity.max()) <= 1
    again, other = Pairs.of(pairs.truths, KINDS, seed=3), Pairs.of(pairs.truths, KINDS, seed=4)
    assert torch.equal(again.images, pairs.images)
    assert not torch.equal(other.images, pairs.images)


def test_every_two_degradations_are_mixed():
    kinds = torch.full((400,), KINDS.index(MIXTURE))
    mixed = draw_severity(kinds, generator(0)) > 0
    assert len({tuple(row) for row in mixed.tolist()}) == 6


def test_shapes_that_do_not_fit_are_errors_of_one_line(user_error):
    with user_error("grey images (N, 1, H, W)", "[2, 3, 12, 12]"):
        degrade(torch.zeros(2, 3, 12, 12), torch.zeros(2, 4), generator(0))
    with user_error("above 9 x 9"):
        degrade(torch.zeros(2, 1, 9, 12), torch.zeros(2, 4), generator(0))
    with user_error("severity of 2 images is (2, 4)", "blur, haze, rain, noise"):
        degrade(torch.zeros(2, 1, 12, 12), torch.zeros(2, 3), generator(0))

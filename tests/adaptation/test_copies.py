"""Copies of samples, pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch

from spectralmoe.adaptation import COPIES, contrasted, neighbours, noisy, rotated, shifted
from spectralmoe.adaptation.copies import copies_of


def clamp(i, n):
    return min(max(i, 0), n - 1)


def shifts_by_hand(image, by=1):
    """Pixel (i, j) of the copy is pixel (i + di, j + dj), the edge repeated."""
    _, h, w = image.shape
    moves = [(di, dj) for di in (-by, 0, by) for dj in (-by, 0, by) if (di, dj) != (0, 0)]
    return [
        torch.stack(
            [torch.stack([image[:, clamp(i + di, h), clamp(j + dj, w)] for j in range(w)], -1) for i in range(h)], -2
        )
        for di, dj in moves
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("by", [1, 2])
def test_shifts(dtype, by):
    images = torch.randn(3, 2, 5, 4, dtype=dtype)
    found = shifted(images, by)
    assert torch.equal(found, torch.stack([copy for image in images for copy in shifts_by_hand(image, by)]))


def turned_by_hand(image, degrees):
    """Each pixel of the copy looks back along the rotation, and mixes the four pixels around that place."""
    channels, h, w = image.shape
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turned = torch.empty(channels, h, w)
    for i in range(h):
        for j in range(w):
            right, down = j - (w - 1) / 2, i - (h - 1) / 2
            x = min(max(c * right - s * down + (w - 1) / 2, 0), w - 1)
            y = min(max(s * right + c * down + (h - 1) / 2, 0), h - 1)
            left, top = math.floor(x), math.floor(y)
            for k in range(channels):
                turned[k, i, j] = sum(
                    (1 - abs(x - b)) * (1 - abs(y - a)) * float(image[k, clamp(a, h), clamp(b, w)])
                    for a in (top, top + 1)
                    for b in (left, left + 1)
                )
    return turned


def test_rotations():
    images = torch.randn(2, 2, 6, 9)
    angles = [-10.0, 10.0, 35.0]
    by_hand = torch.stack([turned_by_hand(image, angle) for image in images for angle in angles])
    torch.testing.assert_close(rotated(images, angles), by_hand, rtol=1e-4, atol=1e-4)
    square = images[..., :6]
    torch.testing.assert_close(rotated(square, [90.0]), torch.rot90(square, 1, (2, 3)), rtol=1e-4, atol=1e-4)
    assert rotated(images.bfloat16()).dtype == torch.bfloat16


def test_contrast_scales_the_distance_from_the_mean_of_each_image():
    images = torch.rand(3, 2, 4, 5, dtype=torch.float64)
    found = contrasted(images, [0.7, 1.3])
    by_hand = [[image.mean() * (1 - f) + f * image for f in (0.7, 1.3)] for image in images]
    torch.testing.assert_close(found, torch.stack([copy for copies in by_hand for copy in copies]))


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (3, 6), (1, 5, 3)])
def test_noise_is_that_of_the_seed_and_of_size_sigma(shape):
    x = torch.rand(shape)
    found = noisy(x, 500, sigma=0.3, seed=4)
    assert found.shape == (500 * shape[0], *shape[1:])
    noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(4))
    assert torch.equal(found, torch.stack([x[i // 500] for i in range(len(found))]) + 0.3 * noise)
    state = torch.get_rng_state()
    assert torch.equal(noisy(x, 500, sigma=0.3, seed=4), found)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(noisy(x, 500, sigma=0.3, seed=5), found)
    assert found.unflatten(0, (shape[0], 500)).std(1).mean() == pytest.approx(0.3, abs=0.02)


def test_neighbours_keep_the_copies_of_a_sample_together():
    images = torch.randn(3, 1, 5, 5)
    found = neighbours(images, count=4, sigma=0.2, seed=7)
    assert len(found) == 3 * 12
    noise = noisy(images, 4, sigma=0.2, seed=7)
    for i, image in enumerate(images):
        own = found[12 * i : 12 * i + 12]
        assert torch.equal(own[:4], noise[4 * i : 4 * i + 4])
        assert torch.equal(own[4:], torch.stack(shifts_by_hand(image)))
    vectors = torch.randn(2, 6)
    assert torch.equal(neighbours(vectors, count=3), noisy(vectors, 3, seed=1))


def test_copies_that_are_scored_are_not_those_that_a_correction_is_built_from():
    """Only the kind that says so shares a copy with ``neighbours``, and it shares all of them."""
    images = torch.rand(2, 1, 8, 8)
    built_from = neighbours(images).unflatten(0, (2, -1))
    scored = {kind: copies.unflatten(0, (2, -1)) for kind, copies in copies_of(images).items()}
    assert scored.keys() == COPIES.keys()
    for kind, copies in scored.items():
        for own, seen in zip(copies, built_from, strict=True):
            shared = [any(torch.equal(copy, other) for other in seen) for copy in own]
            assert (all if COPIES[kind].built_from else any)(shared) == COPIES[kind].built_from, kind


def test_feature_vectors_have_noisy_copies_alone():
    x = torch.rand(2, 6)
    assert copies_of(x).keys() == {"noisy"}
    assert torch.equal(copies_of(x)["noisy"], noisy(x))

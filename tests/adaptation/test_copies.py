"""Copies of samples, pixel by pixel."""

from __future__ import annotations

import pytest
import torch

from spectralmoe.adaptation import neighbours, noisy, shifted


def clamp(i, n):
    return min(max(i, 0), n - 1)


def shifts_by_hand(image):
    """Pixel (i, j) of the copy is pixel (i + di, j + dj), the edge repeated."""
    _, h, w = image.shape
    moves = [(di, dj) for di in (-1, 0, 1) for dj in (-1, 0, 1) if (di, dj) != (0, 0)]
    return [
        torch.stack(
            [torch.stack([image[:, clamp(i + di, h), clamp(j + dj, w)] for j in range(w)], -1) for i in range(h)], -2
        )
        for di, dj in moves
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shifts(dtype):
    images = torch.randn(3, 2, 5, 4, dtype=dtype)
    found = shifted(images)
    assert torch.equal(found, torch.stack([copy for image in images for copy in shifts_by_hand(image)]))


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


def test_the_default_copies_are_not_those_that_are_measured():
    """A correction is judged on other noise than it was given."""
    x = torch.zeros(1, 6)
    assert not torch.equal(neighbours(x), noisy(x))

"""Severity of images from their pixels: order, ends, and independence of what it should not see."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from spectralmoe.data.severity import estimate_severity

SIDE = 64


@pytest.fixture
def photo():
    """A picture with edges and shades, (1, 3, H, W): discs on a slope."""
    y, x = torch.meshgrid(torch.arange(SIDE) / SIDE, torch.arange(SIDE) / SIDE, indexing="ij")
    discs = [((x - a).square() + (y - b).square() < r**2).float() for a, b, r in ((0.3, 0.3, 0.2), (0.7, 0.6, 0.15))]
    grey = 0.1 + 0.3 * x + 0.5 * discs[0] - 0.3 * x * discs[1]
    return grey.expand(1, 3, SIDE, SIDE)


def blurred(image, width):
    return F.avg_pool2d(F.pad(image, [width] * 4, mode="reflect"), 2 * width + 1, 1)


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.2])
def test_noise_is_found_up_to_a_tenth(photo, sigma):
    noisy = photo + sigma * torch.randn(photo.shape)
    found = estimate_severity(noisy)[0, 0]
    assert float(found) == pytest.approx((sigma - 0.02) / 0.18, abs=0.1)


def test_worse_images_are_worse(photo):
    noise = estimate_severity(torch.cat([photo + s * torch.randn(photo.shape) for s in (0.0, 0.1, 0.2)]))[:, 0]
    blur = estimate_severity(torch.cat([photo, blurred(photo, 1), blurred(photo, 3)]))[:, 1]
    contrast = estimate_severity(torch.cat([0.5 + t * (photo - 0.5) for t in (1.0, 0.5, 0.1)]))[:, 2]
    for values in (noise, blur, contrast):
        assert values.tolist() == sorted(set(values.tolist()))


def test_all_is_in_bounds_and_each_image_counts_alone(photo, close):
    images = torch.cat([photo, photo * 0, photo * 0 + 1, torch.rand(photo.shape), 30 * torch.randn(photo.shape)])
    found = estimate_severity(images)
    assert found.shape == (5, 3)
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert (found <= 1).all()
    close(torch.cat([estimate_severity(image[None]) for image in images]), found)
    assert not estimate_severity(images[:0]).numel()
    assert found[1].tolist() == [0, 1, 1]  # a plain image


def test_by_hand(close):
    """A lone spot: N gives 4, 2 four times and 1 four times, the Laplacian 4 and 1 four times, of 25 inner places."""
    image = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    image[0, 0, 3, 3] = 0.5
    sigma = (torch.pi / 2) ** 0.5 / 6 * 0.5 * (4 + 8 + 4) / 25
    variance = 0.25 / 49 - (0.5 / 49) ** 2 - sigma**2
    edges = 0.25 * (16 + 4) / 25 - 20 * sigma**2
    wanted = [(sigma - 0.02) / 0.18, variance / (variance + edges), 1 - 2 * variance**0.5]
    close(estimate_severity(image)[0], torch.tensor(wanted, dtype=torch.float64))


def test_mistakes_are_named(user_error):
    with user_error("images (B, C, H, W)", "[3, 8, 8]"):
        estimate_severity(torch.rand(3, 8, 8))
    with user_error("floating point", "uint8"):
        estimate_severity(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))

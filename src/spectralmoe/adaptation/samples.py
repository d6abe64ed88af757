"""Samples and their labels: which samples are equal, and labels as class numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmoe.errors import UserError

__all__ = ["class_numbers", "same_sample"]


def class_numbers(who: str, y: object) -> Tensor:
    """The labels ``y`` as int64.

    Raises:
        UserError: they are no numbers, or a number that is not whole.
    """
    try:
        labels = torch.as_tensor(y)
        numbers = labels.long()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{who}: labels must be class numbers 0, 1, ..., got {type(y).__name__} {y!r:.30}") from error
    if (other := labels[numbers != labels]).numel():
        raise UserError(f"{who}: labels must be whole class numbers, got {other.flatten()[0].item()}")
    return numbers


def same_sample(samples: Tensor, x: Tensor) -> Tensor:
    """Which of ``samples`` (N, ...) are x (...): (N,) bool, on the CPU.

    Images (C, H, W) with C = 1 or 3 and values in [0, 1] are the same where they are the same in 8 bits, as an image
    file holds them; everything else where every number is equal.

    >>> same_sample(torch.tensor([[0.1, 0.2], [0.1, 0.3]]), torch.tensor([0.1, 0.2]))
    tensor([ True, False])
    """
    samples, x = samples.cpu(), x.cpu()
    if samples.shape[1:] != x.shape:
        return torch.zeros(len(samples), dtype=torch.bool)
    same = (samples == x).flatten(1).all(1)
    if x.dim() == 3 and len(x) in (1, 3) and x.is_floating_point() and 0 <= float(x.min()) < float(x.max()) <= 1:
        pixels = _eight_bits(x)
        if int(pixels.max()) > int(pixels.min()):  # of numbers all near 0 eight bits hold nothing
            same |= (_eight_bits(samples) == pixels).flatten(1).all(1)
    return same


def _eight_bits(x: Tensor) -> Tensor:
    return (x * 255).round().clamp(-1, 256)

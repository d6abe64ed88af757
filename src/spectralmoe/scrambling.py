"""Random numbers that are a function of whole numbers, such as a seed and a step, without a generator or state."""

from __future__ import annotations

from torch import Tensor

__all__ = ["chance", "scrambled"]

_FRACTION = 53


def scrambled(numbers: Tensor) -> Tensor:
    """Return random int64 numbers that are a function of ``numbers``, by SplitMix64 (Steele et al., 2014).

    >>> import torch
    >>> scrambled(torch.tensor([1, 1, 2])).unique().numel()
    2
    """
    numbers = numbers * -7046029254386353131
    numbers = (numbers ^ _shifted(numbers, 30)) * -4658895280553007687
    numbers = (numbers ^ _shifted(numbers, 27)) * -7723592293110705685
    return numbers ^ _shifted(numbers, 31)


def chance(numbers: Tensor, probability: float) -> Tensor:
    """Return True where a random int64 number falls into a share ``probability`` of all numbers."""
    return _shifted(numbers, 64 - _FRACTION) < int(probability * 2**_FRACTION)


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """The 64 bits shifted to the right, zeros in front."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)

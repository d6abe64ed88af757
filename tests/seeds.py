"""Where the random numbers of the tests start: all their seeds are counted from ``pytest --seed``.

Processes that a test starts find the number in their environment.
"""

from __future__ import annotations

import os

import torch

__all__ = ["generator", "set_first", "shifted"]

NAME = "SPECTRALMOE_TEST_SEED"


def set_first(number: int) -> None:
    os.environ[NAME] = str(number)


def shifted(seed: int) -> int:
    """Another number for every first seed and every ``seed`` below a thousand; ``seed`` itself when the first is 0."""
    return seed + 1000 * int(os.environ.get(NAME, "0"))


def generator(seed: int) -> torch.Generator:
    """A generator of its own for the draws that stand under ``seed``."""
    return torch.Generator().manual_seed(shifted(seed))

"""Schedules give the factor on the learning rate after the warm-up, given the steps done and the number of steps."""

from __future__ import annotations

import math

__all__ = ["constant", "cosine", "linear"]


def cosine(done: float, steps: float) -> float:
    """Half a cosine from 1 down to 0.

    Loshchilov and Hutter, "SGDR", arXiv 1608.03983, without restarts.

    >>> cosine(0, 10), round(cosine(5, 10), 12), cosine(10, 10)
    (1.0, 0.5, 0.0)
    """
    return 0.5 * (1 + math.cos(math.pi * done / steps))


def linear(done: float, steps: float) -> float:
    """A straight line from 1 down to 0.

    >>> linear(0, 10), linear(2.5, 10), linear(10, 10)
    (1.0, 0.75, 0.0)
    """
    return 1 - done / steps


def constant(done: float, steps: float) -> float:
    """The full learning rate until the end.

    >>> constant(9, 10)
    1.0
    """
    return 1.0

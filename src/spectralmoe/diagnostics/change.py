"""The change of a model's accuracy, with an interval that holds also for few changes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Change", "accuracy_change"]

Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class Change:
    """The accuracy after a change of the model minus the accuracy before, in percentage points.

    Attributes:
        mean: the difference on the samples.
        low, high: its 95% interval.
        gained, lost: the number of samples that became right, and that became wrong.
        samples: the number of samples.
    """

    mean: float
    low: float
    high: float
    gained: int
    lost: int
    samples: int


def accuracy_change(step: Tensor, samples: int) -> Change:
    r"""Compute the change of the accuracy and its interval from what happened to each sample.

    The interval is that of Agresti and Min for paired proportions (Statistics in Medicine 24, 2005): with g gained and
    l lost of n samples, :math:`\hat d = (g - l)/(n + 2)` and
    :math:`\hat d \pm 1.96 \sqrt{g + l + 1 - (g - l)^2/(n + 2)}/(n + 2)`. It has a width even if nothing changed.

    Args:
        step: 1 for a sample that became right, -1 for one that became wrong, 0 for others; samples that are left out
            count as 0.
        samples: n, at least ``len(step)``; with 0 the result is nan.

    >>> import torch
    >>> change = accuracy_change(torch.tensor([1, -1, -1, 0]), 1000)
    >>> round(change.mean, 3), round(change.low, 3), round(change.high, 3)
    (-0.1, -0.491, 0.291)
    """
    gained, lost = int((step > 0).sum()), int((step < 0).sum())
    if not samples:
        return Change(math.nan, math.nan, math.nan, 0, 0, 0)
    n, difference = samples + 2, gained - lost
    centre = difference / n
    half = Z95 * math.sqrt(gained + lost + 1 - difference**2 / n) / n
    return Change(100 * difference / samples, 100 * (centre - half), 100 * (centre + half), gained, lost, samples)

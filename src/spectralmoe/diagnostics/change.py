"""The change of a model's accuracy, with an interval that is honest about few changes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Change", "accuracy_change"]

Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class Change:
    """Accuracy after minus before, in percentage points; negative is damage.

    Attributes:
        mean: the difference on the samples.  low, high: its 95% interval.
        gained, lost: samples that became right, and wrong.
        samples: how many were compared.
    """

    mean: float
    low: float
    high: float
    gained: int
    lost: int
    samples: int


def accuracy_change(step: Tensor, samples: int) -> Change:
    r"""The change from ``step``: 1 where a sample became right, -1 where wrong, 0 else; others count as 0.

    The interval is that of Agresti and Min for paired proportions (Statistics in Medicine 24, 2005): with g gained and
    l lost of n, :math:`\hat d = (g - l)/(n + 2)` and
    :math:`\hat d \pm 1.96 \sqrt{g + l + 1 - (g - l)^2/(n + 2)}/(n + 2)`; it has a width even where nothing changed.

    Args:
        samples: n, at least ``len(step)``; 0 gives nan, never "no change".

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

"""Mean and 95% interval over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Estimate", "estimate"]

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds; ``half`` is the half width of its 95% interval, None for fewer than two seeds."""

    mean: float
    half: float | None
    values: tuple[float, ...]

    @property
    def n(self) -> int:
        """How many seeds."""
        return len(self.values)


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """Mean and Student 95% interval of the values that exist; None if none does.

    >>> e = estimate([1.0, 2.0, 3.0])
    >>> e.mean, round(e.half, 3), e.n
    (2.0, 2.484, 3)
    """
    found = tuple(value for value in values if value is not None and math.isfinite(value))
    n = len(found)
    if not n:
        return None
    mean = sum(found) / n
    if n == 1:
        return Estimate(mean, None, found)
    variance = sum((value - mean) ** 2 for value in found) / (n - 1)
    t = _T95[n - 2] if n - 1 <= len(_T95) else 1.96
    return Estimate(mean, t * math.sqrt(variance / n), found)

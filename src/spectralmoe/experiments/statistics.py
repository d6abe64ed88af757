"""Mean and 95% interval over seeds, and of differences between rows under the same seeds."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Estimate", "estimate", "paired"]

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_Z95 = 1.959964


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

    @property
    def separated(self) -> bool:
        """Whether the interval does not contain 0: for a difference, whether the seeds tell two rows apart."""
        return self.half is not None and abs(self.mean) > self.half

    def holds(self, value: float) -> bool:
        """Whether the interval holds ``value``."""
        return self.half is not None and abs(value - self.mean) <= self.half


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """Mean and Student 95% interval of the values that exist; None if none does.

    >>> e = estimate([1.0, 2.0, 3.0])
    >>> e.mean, round(e.half, 3), e.n
    (2.0, 2.484, 3)
    """
    finite = tuple(value for value in values if value is not None and math.isfinite(value))
    n = len(finite)
    if not n:
        return None
    mean = sum(finite) / n
    if n == 1:
        return Estimate(mean, None, finite)
    variance = sum((value - mean) ** 2 for value in finite) / (n - 1)
    return Estimate(mean, _t95(n - 1) * math.sqrt(variance / n), finite)


def paired(a: Mapping[Hashable, float | None], b: Mapping[Hashable, float | None]) -> Estimate | None:
    """The differences a - b under the keys (seeds) that both have; None if there are none.

    What a seed does to both rows alike cancels, so rows can differ clearly even where their own intervals overlap.

    >>> difference = paired({0: 5.0, 1: 7.0, 2: 9.0}, {0: 4.0, 1: 6.1, 2: 7.9})
    >>> round(difference.mean, 3), round(difference.half, 3), difference.separated
    (1.0, 0.248, True)
    """
    pairs = ((a[key], b[key]) for key in a if key in b)
    return estimate([x - y for x, y in pairs if x is not None and y is not None])


def _t95(df: int) -> float:
    """The two-sided 95% quantile of Student's t; beyond the table by its expansion about the normal one."""
    if df <= len(_T95):
        return _T95[df - 1]
    z = _Z95
    return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)

"""Measure: a measured value with the amount of data that it rests on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["TOKENS", "Measure", "mean_of"]

TOKENS = 64
"""A share of tokens needs at least this many tokens."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A number with the amount of data that it rests on; without enough data it has no value.

    Attributes:
        value: the number; None if there is not enough data.
        data: the amount of data.
        unit: what the data are: "tokens", "slots", "pairs", "weights", ...
        needs: the least amount of data for a value.

    >>> str(Measure.of(0.25, 4096)), str(Measure.of(0.25, 12, needs=64))
    ('0.25 (4096 tokens)', 'no data (12 of 64 tokens)')
    """

    value: float | None
    data: int
    unit: str = "tokens"
    needs: int = 1

    @classmethod
    def of(cls, value: float | Tensor, data: int | Tensor, unit: str = "tokens", needs: int = 1) -> Measure:
        """Make a measure; it has no value if ``value`` is not finite or ``data`` is less than ``needs``."""
        number, amount = float(value), int(data)
        return cls(number if math.isfinite(number) and amount >= needs else None, amount, unit, needs)

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return self.value is not None

    def as_json(self) -> dict[str, Any]:
        """Return ``{"value": ..., "data": ..., "unit": ...}``, with ``"needs"`` if there is no value."""
        fields: dict[str, Any] = {"value": self.value, "data": self.data, "unit": self.unit}
        return fields if self.known else {**fields, "needs": self.needs}

    def __str__(self) -> str:
        if self.value is None and self.data < self.needs:
            return f"no data ({self.data} of {self.needs} {self.unit})"
        if self.value is None:
            return f"no value ({self.data} {self.unit})"
        return f"{self.value:.3g} ({self.data} {self.unit})"


def mean_of(values: Sequence[float]) -> float | None:
    """Return the mean of some numbers; None if there are none."""
    return sum(values) / len(values) if values else None

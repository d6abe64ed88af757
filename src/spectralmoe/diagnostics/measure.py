"""A value and how much data it rests on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["TOKENS", "Measure", "mean_of"]

TOKENS = 64
"""Shares of tokens are judged from this many tokens on."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A number with the amount of data behind it; without enough data it has no value.

    Attributes:
        value: the number; None where there is no data.
        data: how many things it rests on.
        unit: what they are: "tokens", "slots", "pairs", "weights", ...
        needs: how many it takes to say anything.

    >>> str(Measure.of(0.25, 4096)), str(Measure.of(0.25, 12, needs=64))
    ('0.25 (4096 tokens)', 'no data (12 of 64 tokens)')
    """

    value: float | None
    data: int
    unit: str = "tokens"
    needs: int = 1

    @classmethod
    def of(cls, value: float | Tensor, data: int | Tensor, unit: str = "tokens", needs: int = 1) -> Measure:
        """``value`` if it is finite and rests on at least ``needs`` things, else no data."""
        number, amount = float(value), int(data)
        return cls(number if math.isfinite(number) and amount >= needs else None, amount, unit, needs)

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return self.value is not None

    def at_least(self, threshold: float) -> bool:
        """Whether the value is known and reaches ``threshold``."""
        return self.value is not None and self.value >= threshold

    def as_json(self) -> dict[str, Any]:
        """``{"value": ..., "data": ..., "unit": ...}``; value None and ``needs`` where there is no data."""
        fields: dict[str, Any] = {"value": self.value, "data": self.data, "unit": self.unit}
        return fields if self.known else {**fields, "needs": self.needs}

    def __str__(self) -> str:
        if self.value is None and self.data < self.needs:
            return f"no data ({self.data} of {self.needs} {self.unit})"
        if self.value is None:
            return f"no value ({self.data} {self.unit})"
        return f"{self.value:.3g} ({self.data} {self.unit})"


def mean_of(values: Sequence[float]) -> float | None:
    """The mean of some numbers; None without any."""
    return sum(values) / len(values) if values else None

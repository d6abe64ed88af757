"""What the page reads of training runs and comparisons, checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from spectralmoe.report.schema import Found, Layer, Part

__all__ = ["Comparison", "Monitor", "Row"]


class Shares(Part):
    """Shares of the load after a step, by layer name."""

    step: int
    shares: dict[str, list[float | None]]


class Monitor(Part):
    """The lines of a training run's monitor."""

    title: str
    layers: list[Layer]
    steps: list[dict[str, Any]]
    loads: list[Shares]
    findings: list[Found]


class Row(Part):
    """All seeds of one row: by measure its mean, half the width of its 95% interval, and its values."""

    router: str
    depth: int | None = None

    @property
    def estimates(self) -> dict[str, Mapping[str, Any] | None]:
        """Mean, half width and values of each measure."""
        return {
            key: v for key, v in (self.model_extra or {}).items() if v is None or (isinstance(v, dict) and "mean" in v)
        }


class Comparison(Part):
    """``spectralmoe compare``."""

    title: str
    columns: dict[str, str] = Field(default_factory=dict)
    summary: list[Row] = Field(min_length=1)

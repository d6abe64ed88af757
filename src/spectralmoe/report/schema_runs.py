"""What the page reads of training runs and comparisons, checked when it is read."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from spectralmoe.report.schema import Found, Layer, Part

__all__ = ["Comparison", "Estimate", "History", "Monitor", "Row"]


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


class Epoch(Part):
    """One epoch; the accuracy is in percent."""

    loss: float | None = None
    validation_accuracy: float | None = None
    seconds: float | None = None


class History(Part):
    """``history.json`` of ``spectralmoe train``."""

    title: str
    epochs: list[Epoch] = Field(min_length=1)
    test_accuracy: float | None = None


class Estimate(Part):
    """The mean of some seeds, half the width of its 95% interval, and its values."""

    mean: float | None
    half: float | None = None
    values: list[float | None] = Field(default_factory=list)


class Row(Part):
    """All seeds of one row, an estimate each measure."""

    router: str
    depth: int | None = None
    diverged: list[int] = Field(default_factory=list)

    @property
    def estimates(self) -> dict[str, Estimate | None]:
        """Every entry that is an estimate, or null."""
        return {
            key: None if value is None else Estimate.model_validate(value)
            for key, value in (self.model_extra or {}).items()
            if value is None or (isinstance(value, dict) and "mean" in value)
        }

    @model_validator(mode="after")
    def _are_estimates(self) -> Self:
        assert self.estimates is not None  # read once, so that a broken one is found when the file is read
        return self


class Comparison(Part):
    """``spectralmoe compare``."""

    title: str
    columns: dict[str, str] = Field(default_factory=dict)
    summary: list[Row] = Field(min_length=1)

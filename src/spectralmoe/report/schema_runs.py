"""The fields of training runs and comparisons that the page reads, checked when a file is read."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from spectralmoe.report.schema import Found, Layer
from spectralmoe.report.schema_parts import Part

__all__ = ["Comparison", "Estimate", "History", "Metric", "Monitor", "Row"]


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


class Metric(Part):
    """A measure of runs: its key in the file, its name, its unit."""

    key: str = "accuracy"
    title: str = "accuracy"
    unit: str = "%"
    digits: int = Field(default=1, ge=0, le=9)

    def show(self, value: float | None) -> str:
        """The value with its unit."""
        space = "" if self.unit in ("", "%") else " "
        return "no data" if value is None else f"{value:.{self.digits}f}{space}{self.unit}"


class Epoch(Part):
    """One epoch: loss, seconds, and the run's metric on the validation part."""

    loss: float | None = None
    seconds: float | None = None


class History(Part):
    """``history.json`` of ``spectralmoe train``; a file without ``metric`` is of a classifier."""

    title: str
    epochs: list[Epoch] = Field(min_length=1)
    metric: Metric = Metric()

    @property
    def validation(self) -> list[float | None]:
        """The metric on the validation part after each epoch."""
        return [_number(epoch, f"validation_{self.metric.key}") for epoch in self.epochs]

    @property
    def test(self) -> float | None:
        """The metric of the trained network on the test part."""
        return _number(self, f"test_{self.metric.key}")

    @model_validator(mode="after")
    def _are_numbers(self) -> Self:
        _ = self.validation, self.test  # read once, so that a broken one is found when the file is read
        return self


def _number(part: Part, key: str) -> float | None:
    """A number that a file may have under a name of its own choice."""
    value = (part.model_extra or {}).get(key)
    if value is not None and not isinstance(value, int | float):
        raise ValueError(f"{key} is no number")
    return value


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

"""Base classes for the documents that the page reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["Count", "Group", "Part", "Quantity"]

Count = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """Keys that the page does not know are kept and ignored."""

    model_config = ConfigDict(extra="allow", frozen=True, arbitrary_types_allowed=True)


class Quantity(Part):
    """``Measure.as_json``: a value, and how much data it rests on."""

    value: float | None
    data: Count = 0
    unit: str = ""
    needs: Count = 1


class Group(Part):
    """Measures by name, beside whatever else the group holds."""

    @property
    def measures(self) -> dict[str, Quantity]:
        """Every entry that is a measure, in the order of the file."""
        return {
            key: Quantity.model_validate(value)
            for key, value in (self.model_extra or {}).items()
            if isinstance(value, Mapping) and "value" in value
        }

    @model_validator(mode="after")
    def _are_measures(self) -> Self:
        assert self.measures is not None  # read once, so that a broken one is found when the file is read
        return self

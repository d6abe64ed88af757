"""A finding: one problem of a router, and its cure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["SEVERITIES", "Finding", "Severity"]

Severity = Literal["severe", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("severe", "warning", "note")


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem of a router.

    Attributes:
        kind: one of the keys of ``CURES``.
        layer: the model's own layer number; None: the whole model.
        name: the path of the layer's module.
        severity: "severe", "warning" or "note".
        message: one sentence with the figures.
        cure: what to do about it.
        measure: the value behind it, with its data (``Measure.as_json``).
        threshold: what the value was compared with.
    """

    kind: str
    layer: int | None
    name: str | None
    severity: Severity
    message: str
    cure: str
    measure: Mapping[str, Any] | None = None
    threshold: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

"""The panels of a figure as plain values: rows with intervals, or lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["Better", "Intervals", "Lines", "Mark", "Panel", "Point"]

Better = Literal["higher", "lower", ""]
"""Which way is better; "" where neither is."""


class Mark(NamedTuple):
    """One row of a panel: where its middle and its interval lie, None where nothing was measured.

    Attributes:
        group: rows of one group have one colour in all panels.
        points: single values, drawn as dots.
        at_most: a target, drawn as a tick.
    """

    label: str
    group: str
    middle: float | None = None
    low: float | None = None
    high: float | None = None
    points: tuple[float, ...] = ()
    at_most: float | None = None


@dataclass(frozen=True, slots=True)
class Intervals:
    """A panel with a row for each mark, values along the horizontal axis.

    Attributes:
        title: with the unit.
        x_title: what stands below the axis, before which way is better.
        guides: values at which a dashed line is drawn.
        ratio: a logarithmic axis of base 2.
    """

    title: str
    marks: Sequence[Mark]
    x_title: str = ""
    better: Better = ""
    guides: Sequence[float] = ()
    ratio: bool = False


class Point(NamedTuple):
    """A point of a line; ``half`` is half the width of its interval."""

    x: float
    y: float
    half: float | None = None


@dataclass(frozen=True, slots=True)
class Lines:
    """A panel with a line for each series.

    Attributes:
        title: with the unit.
        series: label -> points; a label has one colour in all panels.
        log_x: even spacing for depths 2, 4, 8, 16.
        guides: values of y at which a dashed line is drawn.
    """

    title: str
    series: Mapping[str, Sequence[Point]]
    x_title: str
    better: Better = ""
    log_x: bool = False
    guides: Sequence[float] = ()


Panel = Intervals | Lines

"""Figures that cards share: each row less its baseline, seed by seed."""

from __future__ import annotations

from collections.abc import Sequence

from spectralmoe.draw.panels import Intervals, Mark
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.experiments.evidence import Cells, difference

__all__ = ["difference_panels"]


def difference_panels(cells: Cells, columns: Sequence[Column], baseline: str) -> list[Intervals]:
    """One panel a column: the paired difference of every other row to ``baseline`` with its 95% interval.

    A column without a single pair has no panel.

    >>> cells = [{"row": row, "seed": s, "loss": s + value} for s in (0, 1) for row, value in (("a", 1), ("b", 3))]
    >>> difference_panels(cells, [Column("loss", "loss", 1, "")], "a")[0].marks[0][:5]
    ('b', 'b', 2.0, 2.0, 2.0)
    """
    rows = [row for row in dict.fromkeys(cell["row"] for cell in cells) if row != baseline]
    panels = []
    for column in columns:
        marks = []
        for row in rows:  # those that were not measured keep their place beside the other panels
            value = difference(cells, column.key, row, baseline)
            if value is None:
                marks.append(Mark(row, row))
                continue
            middle, half = column.scale * value.mean, column.scale * (value.half or 0.0)
            marks.append(Mark(row, row, middle, middle - half, middle + half))
        title = f"{column.title}, less {baseline}"
        panels.append(Intervals(title, marks, better=column.better, guides=(0.0,)))
    return [panel for panel in panels if any(mark.middle is not None for mark in panel.marks)]

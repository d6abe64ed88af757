"""What a comparison writes from its cells: results, summary, tables for documents and pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from spectralmoe.draw.figure import write_figures
from spectralmoe.draw.panels import Intervals, Mark
from spectralmoe.draw.tables import latex_table, markdown_table
from spectralmoe.errors import one_of
from spectralmoe.experiments.compare.columns import (
    COLUMNS,
    Column,
    Row,
    chosen_columns,
    show_value,
    summarise,
    summary_json,
)
from spectralmoe.experiments.compare.settings import CompareSettings
from spectralmoe.experiments.evidence import Cells, show_difference
from spectralmoe.experiments.grid import DIVERGED
from spectralmoe.experiments.statistics import Estimate
from spectralmoe.files import write_text
from spectralmoe.json_files import write_json
from spectralmoe.machine import describe_machine

__all__ = ["WRITES", "Shown", "difference_fields", "value_fields", "write_pictures", "write_results"]

WRITES = ("results.json", "results.csv", "summary.csv", "table.md", "table.tex", "cells", "models")
_BESIDE = ("interference_worst", "min_load_share", "trials", "cpu", "threads", DIVERGED)


class Shown(NamedTuple):
    """What tables and pictures show: these columns of ``known`` ones, and differences to the baseline."""

    columns: tuple[Column, ...]
    baseline: str
    known: tuple[Column, ...] = COLUMNS

    @classmethod
    def of(
        cls,
        columns: Sequence[str],
        baseline: str | None,
        routers: Sequence[str],
        known: tuple[Column, ...] = COLUMNS,
    ) -> Self:
        """From column keys (none: all) and the baseline's name (None: the first router).

        Raises:
            UserError: an unknown column or baseline.
        """
        if baseline is not None and baseline not in routers:
            raise one_of("baseline", baseline, list(routers))
        return cls(chosen_columns(columns, known), baseline or routers[0], known)


def write_results(out: Path, settings: CompareSettings, cells: Cells, shown: Shown) -> list[Row]:
    """``results.json`` and ``results.csv`` with everything; the other tables with what is shown. Returns the rows."""
    present = {cell["router"] for cell in cells}
    rows = summarise(cells, shown.known, shown.baseline if shown.baseline in present else None)
    results = {
        "settings": settings.model_dump(mode="json"),
        "machine": describe_machine(),
        "columns": {column.key: column.meaning for column in shown.known},
        "baseline": shown.baseline,
        "summary": summary_json(rows, shown.baseline),
        "cells": cells,
    }
    write_json(out / "results.json", results)
    write_text(out / "results.csv", _csv(["router", "depth", "seed", *(c.key for c in shown.known), *_BESIDE], cells))
    write_text(out / "summary.csv", _summary(rows, shown))
    tables = [(value_fields(rows, shown), ""), (difference_fields(rows, shown), f"Paired differences: {_minus(shown)}")]
    shown_tables = [(table, title) for table, title in tables if table.rows]
    write_text(out / "table.md", _joined(shown_tables, markdown_table, ""))
    write_text(out / "table.tex", _joined(shown_tables, latex_table, "% "))
    return rows


class Fields(NamedTuple):
    """A table as text."""

    headings: list[str]
    rows: list[list[str]]


def value_fields(rows: Sequence[Row], shown: Shown) -> Fields:
    """A line for each row: its seeds, its means with their intervals."""
    headings = ["router", "depth", "seeds", *(column.title for column in shown.columns)]
    lines = [[*_name(row), *(show_value(c, row.values[c.key]) for c in shown.columns)] for row in rows]
    return Fields(headings, lines)


def difference_fields(rows: Sequence[Row], shown: Shown) -> Fields:
    """A line for each row but the baseline's: its paired differences, and whether the seeds separate them from 0."""
    headings = ["router", "depth", "pairs", *(column.title for column in shown.columns)]
    lines = []
    for row in rows:
        if row.differences:
            pairs = max((value.n for value in row.differences.values() if value), default=0)
            fields = (show_difference(row.differences[c.key], c.digits, c.scale) for c in shown.columns)
            lines.append([row.router, str(row.depth), str(pairs), *fields])
    return Fields(headings, lines)


def write_pictures(out: Path, rows: Sequence[Row], shown: Shown) -> tuple[list[Path], list[str]]:
    """``comparison`` and ``differences`` as SVG, PDF and PNG: their paths, and why they could not be drawn."""
    measured = [row for row in rows if row.seeds]
    compared = [row for row in measured if row.differences]
    told_apart = [column for column in shown.columns if _varies(column, measured)]
    figures = {
        "comparison": [_panel(c, [(row, row.values[c.key]) for row in measured]) for c in told_apart],
        "differences": [
            _panel(c, [(row, row.differences[c.key]) for row in compared], x_title=_minus(shown), guides=(0.0,))
            for c in (told_apart if compared else ())
        ],
    }
    return write_figures(out, figures, names=[row.router for row in measured])


def _varies(column: Column, rows: Sequence[Row]) -> bool:
    """Whether a column tells any two rows apart; among fewer than two rows every one counts."""
    values = {value for row in rows if (e := row.values[column.key]) is not None for value in e.values}
    return len(values) > 1 or (len(rows) < 2 and bool(values))


def _panel(column: Column, rows: Sequence[tuple[Row, Estimate | None]], **options: Any) -> Intervals:
    several = len({row.depth for row, _ in rows}) > 1
    marks = [
        _mark(f"{row.router}, depth {row.depth}" if several else row.router, row.router, value, column.scale)
        for row, value in rows
    ]
    unit = f" ({column.unit})" if column.unit else ""
    return Intervals(f"{column.title}{unit}", marks, better=column.better, **options)


def _mark(label: str, group: str, value: Estimate | None, scale: float) -> Mark:
    if value is None:
        return Mark(label, group)
    half, points = value.half or 0.0, tuple(scale * x for x in value.values)
    return Mark(label, group, scale * value.mean, scale * (value.mean - half), scale * (value.mean + half), points)


def _name(row: Row) -> list[str]:
    return [row.router, str(row.depth), f"{len(row.seeds)}{f', {len(row.diverged)} diverged' if row.diverged else ''}"]


def _minus(shown: Shown) -> str:
    return f"minus {shown.baseline}"


def _summary(rows: Sequence[Row], shown: Shown) -> str:
    """Rounded as in the table: mean and half width of the interval, then those of the difference to the baseline."""
    lines = []
    for row in rows:
        line = dict(zip(("router", "depth", "seeds"), _name(row), strict=True))
        for column in shown.columns:
            pairs = (
                (column.title, row.values[column.key]),
                (_difference_title(column, shown), row.differences.get(column.key)),
            )
            for title, value in pairs:
                line[title] = "" if value is None else _rounded(column, value.mean)
                line[f"{title} ±"] = "" if value is None or value.half is None else _rounded(column, value.half)
        lines.append(line)
    titles = [title for c in shown.columns for title in (c.title, _difference_title(c, shown))]
    return _csv(["router", "depth", "seeds", *(t for title in titles for t in (title, f"{title} ±"))], lines)


def _difference_title(column: Column, shown: Shown) -> str:
    return f"{column.title} {_minus(shown)}"


def _rounded(column: Column, value: float) -> str:
    return f"{value * column.scale:.{column.digits}f}"


def _joined(tables: Iterable[tuple[Fields, str]], lines_of: Any, comment: str) -> str:
    parts = []
    for fields, title in tables:
        heading = [f"{comment}{title}", ""] if title else []
        parts.append("\n".join([*heading, *lines_of(fields.headings, fields.rows)]))
    return "\n\n".join(parts) + "\n"


def _csv(keys: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

"""RESULTS.md of a card: means with intervals, and differences paired by seed and processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spectralmoe.draw.tables import markdown_table
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.experiments.evidence import Cells, difference, machines, select, show, show_difference
from spectralmoe.experiments.grid import DIVERGED
from spectralmoe.experiments.statistics import estimate

__all__ = ["Section", "result_lines"]


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, a table of the cells, and a table of the differences between their rows.

    Attributes:
        heading: with its ``#``.
        rows: keys that tell the lines of the table apart -> their headings; lines are sorted by ``sort``, else stand in
            the order of their first cell.
        pairs: (row, baseline); compared within each value of ``within``.
    """

    heading: str
    cells: Cells
    columns: Sequence[Column]
    rows: Mapping[str, str] = field(default_factory=lambda: {"row": "row"})
    sort: Sequence[str] = ()
    pairs: Sequence[tuple[str, str]] = ()
    within: str | None = None
    differences: Sequence[Column] = ()


def result_lines(title: str, about: str, sections: Sequence[Section]) -> list[str]:
    """The lines of RESULTS.md; a letter stands for each processor."""
    known = machines([cell for section in sections for cell in section.cells])
    letters = {cpu: "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[place % 26] for place, cpu in enumerate(known)}
    lines = [f"# {title}: results", "", *about.strip().splitlines(), ""]
    lines += ["Processors: " + "; ".join(f"{letter} {cpu}" for cpu, letter in letters.items()) + "."]
    for section in sections:
        lines += ["", section.heading, "", *_values(section, letters)]
        table = _differences(section)
        if len(table) > 2:
            lines += ["", f"#{section.heading}: paired differences", "", *table]
    return lines


def _values(section: Section, letters: Mapping[str, str]) -> list[str]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for cell in section.cells:
        groups.setdefault(tuple(cell[key] for key in section.rows), []).append(cell)
    places = [list(section.rows).index(key) for key in section.sort]
    lines = []
    for name, cells in sorted(groups.items(), key=lambda item: [item[0][place] for place in places]):
        fields = [show(estimate([cell.get(c.key) for cell in cells]), c.digits, c.scale) for c in section.columns]
        failed = sum(DIVERGED in cell for cell in cells)
        seeds = f"{len(cells) - failed}{f', {failed} diverged' if failed else ''}"
        lines.append([*name, seeds, "".join(letters[cpu] for cpu in machines(cells)), *fields])
    return markdown_table([*section.rows.values(), "seeds", "cpu", *(c.title for c in section.columns)], lines)


def _differences(section: Section) -> list[str]:
    columns, within, lines = section.differences or section.columns, section.within, []
    for value in sorted({cell[within] for cell in section.cells}) if within else [None]:
        cells = select(section.cells, **{within: value}) if within else section.cells
        for row, baseline in section.pairs:
            differences = [difference(cells, column.key, row, baseline) for column in columns]
            pairs = max((one.n for one in differences if one), default=0)
            if pairs:
                fields = [show_difference(one, c.digits, c.scale) for one, c in zip(differences, columns, strict=True)]
                lines.append([row, baseline, *([value] if within else []), pairs, *fields])
    headings = ["row", "minus", *([within] if within else []), "seeds", *(column.title for column in columns)]
    return markdown_table(headings, lines)

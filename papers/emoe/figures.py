"""The card's tables and the few-shot figure, from its JSON files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spectralmoe.compare.statistics import estimate
from spectralmoe.files import write_text
from spectralmoe.report.chart import Panel, Point, draw

Cells = Sequence[Mapping[str, Any]]

COLUMNS = (
    ("accuracy", "accuracy %", 2),
    ("maxvio", "MaxVio", 2),
    ("gini", "Gini", 2),
    ("dead", "dead", 1),
    ("min_load_share", "smallest load share", 3),
    ("output_cos2", "output cos²", 4),
    ("entropy", "entropy", 2),
    ("changed_by_noise", "changed by noise", 3),
)


def write_figures(out: Path, results: Cells, ablations: Cells, shots: Cells) -> None:
    """``RESULTS.md`` and ``fewshot.svg``."""
    lines = [
        "# EMoE: results",
        "",
        "Written by `card.py`: mean and 95% interval over seeds. Dead experts: of both layers",
    ]
    lines += ["together. Entropy: of a token's gate, 1 is uniform. Smallest share: of 8 experts, 0.125 is even.", ""]
    lines += ["## From scratch", "", *_table(results, "row", (*COLUMNS, ("step_ms", "step, ms", 1)))]
    lines += ["", "## One change at a time (validation data)", "", *_table(ablations, "variant", COLUMNS)]
    tasks = list(dict.fromkeys(cell["task"] for cell in shots))
    for task in tasks:
        lines += ["", f"## Few-shot: {task}", "", *_shot_table([cell for cell in shots if cell["task"] == task])]
    write_text(out / "RESULTS.md", "\n".join(lines) + "\n")
    panels = [Panel(f"{task}: accuracy %", _series(shots, task), "images a class", log_x=True) for task in tasks]
    write_text(out / "fewshot.svg", draw(panels, "A frozen backbone, a new task: accuracy after few images a class"))


def _table(cells: Cells, key: str, columns: Sequence[tuple[str, str, int]]) -> list[str]:
    lines = [f"| {key} | seeds | " + " | ".join(title for _, title, _ in columns) + " |"]
    lines.append("| --- " * (2 + len(columns)) + "|")
    for name in dict.fromkeys(cell[key] for cell in cells):
        mine = [cell for cell in cells if cell[key] == name]
        fields = [_field([cell[column] for cell in mine], digits) for column, _, digits in columns]
        lines.append(f"| {name} | {len(mine)} | " + " | ".join(fields) + " |")
    return lines


def _shot_table(cells: Cells) -> list[str]:
    shots = sorted({cell["shots"] for cell in cells})
    lines = ["| row | " + " | ".join(f"{n} shots" for n in shots) + " |", "| --- " * (1 + len(shots)) + "|"]
    for row in dict.fromkeys(cell["row"] for cell in cells):
        mine = [[c["accuracy"] for c in cells if c["row"] == row and c["shots"] == n] for n in shots]
        lines.append(f"| {row} | " + " | ".join(_field(values, 2) for values in mine) + " |")
    return lines


def _series(cells: Cells, task: str) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for cell in cells:
        found.setdefault(cell["row"], [])
    for row, points in found.items():
        for n in sorted({cell["shots"] for cell in cells}):
            value = estimate([c["accuracy"] for c in cells if (c["row"], c["task"], c["shots"]) == (row, task, n)])
            if value is not None:
                points.append((n, value.mean, value.half or 0.0))
    return {row: points for row, points in found.items() if points}


def _field(values: Sequence[float | None], digits: int) -> str:
    value = estimate(values)
    if value is None or not math.isfinite(value.mean):
        return "-"
    half = f" ±{value.half:.{digits}f}" if value.half else ""
    return f"{value.mean:.{digits}f}{half}"

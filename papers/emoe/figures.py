"""The card's tables and the few-shot figure, from its JSON files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rows import BASELINES, FEW_BASELINES

from spectralmoe.experiments.evidence import Cells, difference, machines, select, show, show_difference
from spectralmoe.experiments.statistics import estimate
from spectralmoe.files import write_text
from spectralmoe.report.chart import Panel, Point, draw

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


DIFFERENCES = (
    ("accuracy", "accuracy", 2),
    ("maxvio", "MaxVio", 2),
    ("min_load_share", "smallest load share", 3),
    ("output_cos2", "output cos²", 4),
    ("changed_by_noise", "changed by noise", 3),
)
HEAD = """# EMoE: results

Written by `card.py`: mean and 95% interval over seeds. Dead experts: of both layers together. Entropy: of a token's
gate, 1 is uniform. Smallest share: of 8 experts, 0.125 is even. Differences are paired: the same seed, so the same
start and the same order of images, on the same processor; "separated" where their 95% interval leaves out 0. Single
cells are not stable across processors, means over seeds are.
"""


def write_figures(out: Path, results: Cells, ablations: Cells, shots: Cells) -> None:
    """``RESULTS.md`` and ``fewshot.svg``."""
    write_text(out / "RESULTS.md", "\n".join(tables(results, ablations, shots)) + "\n")
    tasks = list(dict.fromkeys(cell["task"] for cell in shots))
    panels = [Panel(f"{task}: accuracy %", _series(shots, task), "images a class", log_x=True) for task in tasks]
    write_text(out / "fewshot.svg", draw(panels, "A frozen backbone, a new task: accuracy after few images a class"))


def tables(results: Cells, ablations: Cells, shots: Cells) -> list[str]:
    """The lines of ``RESULTS.md``."""
    known = machines([*results, *ablations, *shots])
    lines = [*HEAD.splitlines(), "", "Processors: " + "; ".join(f"{_letter(cpu, known)} {cpu}" for cpu in known) + "."]
    lines += ["", "## From scratch", "", *_rows(results, "row", (*COLUMNS, ("step_ms", "step, ms", 1)), known)]
    lines += ["", "### From scratch: paired differences", "", *_differences(results)]
    lines += ["", "## One change at a time (validation data)", "", *_rows(ablations, "variant", COLUMNS, known)]
    for task in dict.fromkeys(cell["task"] for cell in shots):
        mine = select(shots, task=task)
        lines += ["", f"## Few-shot: {task}", "", *_shot_table(mine)]
        lines += ["", f"### Few-shot: {task}: paired differences", "", *_shot_differences(mine)]
    return lines


def _letter(cpu: str, known: Sequence[str]) -> str:
    return "ABCDEFGH"[known.index(cpu)]


def _table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "| --- " * len(headings) + "|"]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]


def _rows(cells: Cells, key: str, columns: Sequence[tuple[str, str, int]], known: Sequence[str]) -> list[str]:
    rows = []
    for name in dict.fromkeys(cell[key] for cell in cells):
        mine = select(cells, **{key: name})
        fields = [show(estimate([cell[column] for cell in mine]), digits) for column, _, digits in columns]
        rows.append([name, len(mine), "".join(_letter(cpu, known) for cpu in machines(mine)), *fields])
    return _table([key, "seeds", "cpu", *(title for _, title, _ in columns)], rows)


def _differences(cells: Cells) -> list[str]:
    rows = []
    for row, baseline in BASELINES:
        found = [(difference(cells, key, row, baseline), digits) for key, _, digits in DIFFERENCES]
        if found[0][0] is not None:
            fields = [show_difference(value, digits) for value, digits in found]
            rows.append([row, baseline, found[0][0].n, *fields])
    return _table(["row", "minus", "seeds", *(title for _, title, _ in DIFFERENCES)], rows)


def _shot_table(cells: Cells) -> list[str]:
    shots = sorted({cell["shots"] for cell in cells})
    rows = []
    for row in dict.fromkeys(cell["row"] for cell in cells):
        values = [estimate([cell["accuracy"] for cell in select(cells, row=row, shots=n)]) for n in shots]
        rows.append([row, *(show(value, 2) for value in values)])
    return _table(["row", *(f"{n} shots" for n in shots)], rows)


def _shot_differences(cells: Cells) -> list[str]:
    shots, rows = sorted({cell["shots"] for cell in cells}), []
    for row, baseline in FEW_BASELINES:
        found = [difference(select(cells, shots=n), "accuracy", row, baseline) for n in shots]
        rows.append([row, baseline, *(show_difference(value, 2) for value in found)])
    return _table(["row", "minus", *(f"{n} shots" for n in shots)], rows)


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

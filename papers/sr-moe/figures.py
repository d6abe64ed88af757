"""The card's figures and tables, from its JSON files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rows import BASELINES, DECIDING, GUARD

from spectralmoe.adaptation import COPIES
from spectralmoe.experiments.evidence import Cells, difference, machines, select, show, show_difference
from spectralmoe.experiments.statistics import estimate
from spectralmoe.files import write_text
from spectralmoe.report.chart import Panel, Point, draw

Column = tuple[str, str, int, float]
"""Key of the cells, title, digits, scale."""

COLUMNS = (
    ("accuracy", "accuracy %", 2, 1.0),
    ("interference_mean", "interference, mean", 3, 1.0),
    ("interference_worst", "worst trial", 2, 1.0),
    ("success", "success %", 1, 100.0),
    ("min_load_share", "smallest load share", 3, 1.0),
    ("stable_rank", "stable rank", 2, 1.0),
)
CARRY = tuple((f"{key}_after", f"{kind.text} right %", 0, 100.0) for key, kind in COPIES.items())
DIFFERENCES = (
    ("accuracy", "accuracy", 2, 1.0),
    ("interference_mean", "interference", 3, 1.0),
    ("min_load_share", "smallest load share", 3, 1.0),
)
HEAD = """# SR-MoE: results

Written by `card.py` from `results.json` and `streams.json`: mean and 95% interval over seeds. Interference in
percentage points of test accuracy, negative is damage. Differences are paired: the same seed, so the same start and the
same order of images, on the same processor; "separated" where their 95% interval leaves out 0. Single cells are not
stable across processors, means over seeds are.

Corrections with the guard are built from noisy copies and copies shifted by one pixel (`shifted 1 px`, so these are no
test of how far they carry; the noise is drawn anew). No correction has seen the other kinds.
"""


def write_figures(out: Path, cells: Cells, curves: Cells, streams: Cells) -> None:
    """``interference.svg``, ``training.svg``, ``stream.svg`` and ``RESULTS.md``."""
    datasets = list(dict.fromkeys(cell["dataset"] for cell in cells))
    panels = [panel for dataset in datasets for panel in _against_depth(select(cells, dataset=dataset), dataset)]
    write_text(out / "interference.svg", draw(panels, "One correction: change of accuracy on all other test images"))
    write_text(out / "training.svg", draw(*_through_training(curves)))
    if streams:
        write_text(out / "stream.svg", draw(_streams(streams), "Guarded corrections in a row, none taken back"))
    write_text(out / "RESULTS.md", "\n".join(tables(cells, streams)) + "\n")


def _against_depth(cells: Cells, dataset: str) -> list[Panel]:
    rows = [row for row in (*DECIDING, "SR-MoE" + GUARD) if select(cells, row=row)]
    depths = sorted({cell["depth"] for cell in cells})

    def series(key: str) -> dict[str, list[Point]]:
        found: dict[str, list[Point]] = {}
        for row in rows:
            for depth in depths:
                value = estimate([cell[key] for cell in select(cells, row=row, depth=depth)])
                if value is not None:
                    found.setdefault(row, []).append((depth, value.mean, value.half or 0.0))
        return found

    mean = Panel(f"{dataset}: mean, points", series("interference_mean"), "depth", log_x=True, marks=(0.0, -0.32))
    worst = Panel(f"{dataset}: worst trial, points", series("interference_worst"), "depth", log_x=True, marks=(0.0,))
    return [mean, worst]


def _through_training(curves: Cells) -> tuple[list[Panel], str]:
    panels = []
    dataset = curves[0]["dataset"] if curves else ""
    depth = max((curve["depth"] for curve in curves if curve["depth"] <= 8), default=0)
    chosen = [curve for curve in select(curves, dataset=dataset, depth=depth) if curve["row"] in DECIDING]
    for key, title in (
        ("min_load_share", "smallest load share"),
        ("stable_rank", "stable rank of the gate"),
    ):
        series: dict[str, list[Point]] = {}
        for row in dict.fromkeys(curve["row"] for curve in chosen):
            for points in zip(*(curve["curve"] for curve in select(chosen, row=row)), strict=False):
                mean = sum(point[key] for point in points) / len(points)
                series.setdefault(row, []).append((round(points[0]["done"], 3), mean, 0.0))
        panels.append(Panel(title, series, "share of training done"))
    return panels, f"Load and stable rank (of at most 8) through training: {dataset}, depth {depth}"


def _streams(streams: Cells) -> list[Panel]:
    panels = []
    for key, title in (
        ("accuracy_on_others", "accuracy on the others, change in points"),
        ("kept_so_far", "kept so far"),
    ):
        series: dict[str, list[Point]] = {}
        for dataset, depth in dict.fromkeys((stream["dataset"], stream["depth"]) for stream in streams):
            chosen, points = select(streams, dataset=dataset, depth=depth), list[Point]()
            start = sum(s[key][-1] - s["cost"] for s in chosen) / len(chosen) if key == "accuracy_on_others" else 0.0
            for index, values in enumerate(zip(*(s[key] for s in chosen), strict=False), 1):
                points.append((index, sum(values) / len(values) - start, 0.0))
            series[f"{dataset}, depth {depth}"] = points
        panels.append(Panel(title, series, "corrections", marks=(-0.5,) if key == "accuracy_on_others" else (0.9,)))
    return panels


def tables(cells: Cells, streams: Cells) -> list[str]:
    """The lines of ``RESULTS.md``."""
    known = machines([*cells, *streams])
    lines = [
        *HEAD.splitlines(),
        "",
        "Processors: " + "; ".join(f"{_letter(cpu, known)} {cpu}" for cpu in known) + ".",
        "",
    ]
    for dataset in dict.fromkeys(cell["dataset"] for cell in cells):
        mine = select(cells, dataset=dataset)
        lines += [f"## {dataset}", "", *_rows(mine, COLUMNS, known), ""]
        lines += [f"### {dataset}: paired differences", "", *_differences(mine, BASELINES, DIFFERENCES), ""]
        measured = [cell for cell in mine if "rotated_after" in cell]
        lines += [f"### {dataset}: how far corrections carry", "", *_rows(measured, CARRY, known), ""]
        lines += [*_differences(measured, (("SR-MoE" + GUARD, "SR-MoE"),), CARRY), ""]
    if streams:
        lines += ["## Corrections in a row", "", *_stream_table(streams, known)]
    return lines


def _letter(cpu: str, known: Sequence[str]) -> str:
    return "ABCDEFGH"[known.index(cpu)]


def _table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "| --- " * len(headings) + "|"]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]


def _rows(cells: Cells, columns: Sequence[Column], known: Sequence[str]) -> list[str]:
    rows = []
    for depth, row in sorted({(cell["depth"], cell["row"]) for cell in cells}):
        mine = select(cells, row=row, depth=depth)
        fields = [show(estimate([cell[key] for cell in mine]), digits, scale) for key, _, digits, scale in columns]
        rows.append([row, depth, len(mine), "".join(_letter(cpu, known) for cpu in machines(mine)), *fields])
    return _table(["row", "depth", "seeds", "cpu", *(title for _, title, _, _ in columns)], rows)


def _differences(cells: Cells, pairs: Sequence[tuple[str, str]], columns: Sequence[Column]) -> list[str]:
    rows = []
    for depth in sorted({cell["depth"] for cell in cells}):
        mine = select(cells, depth=depth)
        for row, baseline in pairs:
            found = [(difference(mine, key, row, baseline), d, scale) for key, _, d, scale in columns]
            if found[0][0] is not None:
                fields = [show_difference(value, d, scale) for value, d, scale in found]
                rows.append([row, baseline, depth, found[0][0].n, *fields])
    return _table(["row", "minus", "depth", "seeds", *(title for _, title, _, _ in columns)], rows)


def _stream_table(streams: Cells, known: Sequence[str]) -> list[str]:
    rows = []
    for s in sorted(streams, key=lambda s: (s["dataset"], s["depth"], s["seed"])):
        fields = [f"{100 * s['success']:.0f}", f"{s['cost']:+.2f}", f"{100 * s['kept']:.0f}"]
        fields += [show(estimate([s.get(key)]), digits, scale) for key, _, digits, scale in CARRY]
        rows.append([s["dataset"], s["depth"], s["seed"], _letter(s["cpu"], known), s["corrections"], *fields])
    titles = [title for _, title, _, _ in CARRY]
    return _table(["data", "depth", "seed", "cpu", "corrections", "success %", "cost", "kept %", *titles], rows)

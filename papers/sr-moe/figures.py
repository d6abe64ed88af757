"""The card's figures and tables, from its JSON files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rows import DECIDING

from spectralmoe.compare.statistics import estimate
from spectralmoe.files import write_text
from spectralmoe.report.chart import Panel, Point, draw

Cells = Sequence[Mapping[str, Any]]

COLUMNS = (
    ("accuracy", "accuracy %", 2, 1.0),
    ("interference_mean", "interference, mean", 3, 1.0),
    ("interference_worst", "worst trial", 2, 1.0),
    ("success", "success %", 1, 100.0),
    ("min_load_share", "smallest load share", 3, 1.0),
    ("stable_rank", "stable rank", 2, 1.0),
    ("noisy_after", "noisy copies right %", 0, 100.0),
    ("shifted_two_after", "shifted copies right %", 0, 100.0),
)


def write_figures(out: Path, cells: Cells, curves: Cells, streams: Cells) -> None:
    """``interference.svg``, ``training.svg``, ``stream.svg`` and ``RESULTS.md``."""
    datasets = list(dict.fromkeys(cell["dataset"] for cell in cells))
    panels = [panel for dataset in datasets for panel in _against_depth(cells, dataset)]
    write_text(out / "interference.svg", draw(panels, "One correction: change of accuracy on all other test images"))
    write_text(out / "training.svg", draw(*_through_training(curves)))
    if streams:
        write_text(out / "stream.svg", draw(_streams(streams), "Guarded corrections in a row, none taken back"))
    write_text(out / "RESULTS.md", "\n".join(_tables(cells, streams, datasets)) + "\n")


def _values(cells: Cells, row: str, dataset: str, depth: int, key: str) -> list[float | None]:
    wanted = {"row": row, "dataset": dataset, "depth": depth}
    return [cell[key] for cell in cells if all(cell[name] == value for name, value in wanted.items())]


def _against_depth(cells: Cells, dataset: str) -> list[Panel]:
    rows = [row for row in (*DECIDING, "SR-MoE+guard") if any(cell["row"] == row for cell in cells)]
    depths = sorted({cell["depth"] for cell in cells})

    def series(key: str) -> dict[str, list[Point]]:
        found: dict[str, list[Point]] = {}
        for row in rows:
            for depth in depths:
                value = estimate(_values(cells, row, dataset, depth, key))
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
    chosen = [curve for curve in curves if curve["dataset"] == dataset and curve["depth"] == depth]
    for key, title in (
        ("min_load_share", "smallest load share"),
        ("stable_rank", "stable rank of the gate"),
    ):
        series: dict[str, list[Point]] = {}
        for row in dict.fromkeys(curve["row"] for curve in chosen):
            mine = [curve["curve"] for curve in chosen if curve["row"] == row]
            for points in zip(*mine, strict=False):
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
        for stream in streams:
            label = f"{stream['dataset']}, depth {stream['depth']}"
            if label in series:
                continue
            mine = [s for s in streams if s["dataset"] == stream["dataset"] and s["depth"] == stream["depth"]]
            for index, values in enumerate(zip(*(s[key] for s in mine), strict=False), 1):
                mean = sum(values) / len(values)
                start = sum(s[key][-1] - s["cost"] for s in mine) / len(mine) if key == "accuracy_on_others" else 0.0
                series.setdefault(label, []).append((index, mean - start, 0.0))
        panels.append(Panel(title, series, "corrections", marks=(-0.5,) if key == "accuracy_on_others" else (0.9,)))
    return panels


def _tables(cells: Cells, streams: Cells, datasets: Sequence[str]) -> list[str]:
    lines = ["# SR-MoE: results", "", "Written by `card.py` from `results.json` and `streams.json`: mean and 95%"]
    lines += ["interval over seeds. Interference in percentage points of test accuracy, negative is damage.", ""]
    for dataset in datasets:
        lines += [f"## {dataset}", "", "| row | depth | seeds | " + " | ".join(c[1] for c in COLUMNS) + " |"]
        lines.append("| --- " * (3 + len(COLUMNS)) + "|")
        keys = sorted({(cell["depth"], cell["row"]) for cell in cells if cell["dataset"] == dataset})
        for depth, row in keys:
            seeds = len(_values(cells, row, dataset, depth, "accuracy"))
            fields = [_field(_values(cells, row, dataset, depth, key), d, scale) for key, _, d, scale in COLUMNS]
            lines.append(f"| {row} | {depth} | {seeds} | " + " | ".join(fields) + " |")
        lines.append("")
    if streams:
        lines += ["## Corrections in a row", "", "| data | depth | seed | corrections | success % | cost | kept % |"]
        lines.append("| --- " * 7 + "|")
        for s in sorted(streams, key=lambda s: (s["dataset"], s["depth"], s["seed"])):
            lines.append(
                f"| {s['dataset']} | {s['depth']} | {s['seed']} | {s['corrections']} | {100 * s['success']:.0f} | "
                f"{s['cost']:+.2f} | {100 * s['kept']:.0f} |"
            )
    return lines


def _field(values: Sequence[float | None], digits: int, scale: float) -> str:
    value = estimate(values)
    if value is None:
        return "-"
    half = f" ±{value.half * scale:.{digits}f}" if value.half else ""
    return f"{value.mean * scale:.{digits}f}{half}"

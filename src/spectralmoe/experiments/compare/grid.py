"""Run a comparison cell by cell; a run that was killed goes on where it stopped."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from spectralmoe.errors import UserError
from spectralmoe.experiments.compare.cell import run_cell
from spectralmoe.experiments.compare.columns import COLUMNS, summarise, summary_json
from spectralmoe.experiments.compare.picture import draw
from spectralmoe.experiments.compare.settings import Cell, CompareSettings
from spectralmoe.experiments.compare.setup import Setup
from spectralmoe.experiments.compare.tuning import TRIED, best_setting, note, try_candidate, untried
from spectralmoe.experiments.run_folder import run_folder
from spectralmoe.experiments.workers import Job, run_jobs
from spectralmoe.files import read_json, write_json, write_text
from spectralmoe.machine import describe_machine
from spectralmoe.training.loop import Progress
from spectralmoe.training.network import CHECKPOINT
from spectralmoe.training.tasks import Task

__all__ = ["run"]

WRITES = ("results.json", "results.csv", "comparison.svg", TRIED, "models")


def run(
    settings: CompareSettings, task: Task, out: Path, device: torch.device, progress: Progress, *, processes: int = 1
) -> list[dict[str, Any]]:
    """Run all cells of ``settings`` that ``out`` does not hold yet, and write its results.

    ``out`` holds ``settings.json``, ``results.json`` and ``results.csv`` (rewritten after each cell),
    ``comparison.svg`` and ``models/CELL/``.

    Args:
        processes: cells that run at a time, each on one thread; 1: one cell after the other, on all threads.

    Raises:
        UserError: as ``run_folder``; settings that cannot work; a damaged results file.
    """
    settings.check()
    setup = Setup(settings, task, out, device)
    with run_folder(out, {**settings.model_dump(mode="json"), "images": task.fingerprint}, WRITES):
        rows = _finished(out)
        cells = settings.cells()
        for _, tried in run_jobs(_tuning(setup), processes, progress):
            note(tried, setup)
        for cell, row in run_jobs(_training(setup, rows), processes, progress):
            rows[cell] = row
            _write(setup, rows, processes)
            (out / "models" / cell.name / CHECKPOINT).unlink(missing_ok=True)
        progress("done", 1.0)
        _write(setup, rows, processes)
    return [rows[cell] for cell in cells]


def _tuning(setup: Setup) -> list[Job]:
    settings = setup.settings
    first = [cell for cell in settings.cells() if cell.seed == settings.seed]
    return [
        Job(cell, f"tuning {cell.router}, depth {cell.depth}", try_candidate, (cell, index, setup))
        for cell, index in untried(first, setup)
    ]


def _training(setup: Setup, rows: Mapping[Cell, dict[str, Any]]) -> list[Job]:
    missing = [
        cell
        for cell in setup.settings.cells()
        if cell not in rows or not (setup.out / "models" / cell.name / "config.json").exists()
    ]
    return [Job(cell, _text(cell), run_cell, (cell, best_setting(cell, setup), setup)) for cell in missing]


def _text(cell: Cell) -> str:
    return f"{cell.router}, depth {cell.depth}, seed {cell.seed}"


def _finished(out: Path) -> dict[Cell, dict[str, Any]]:
    path = out / "results.json"
    if not path.exists():
        return {}
    try:
        rows = read_json(path)["cells"]
        summarise(rows)
        return {Cell(row["router"], row["depth"], row["seed"]): row for row in rows}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not the results file of a comparison; move it away or choose another --out"
        ) from error


def _write(setup: Setup, rows: Mapping[Cell, dict[str, Any]], processes: int) -> None:
    """The results so far, cells in the order of the grid."""
    settings, out = setup.settings, setup.out
    ordered = [rows[cell] for cell in settings.cells() if cell in rows]
    summary = summarise(ordered)
    results = {
        "settings": settings.model_dump(mode="json"),
        "machine": {**describe_machine(), "processes": processes},
        "columns": {column.key: column.meaning for column in COLUMNS},
        "summary": summary_json(summary),
        "cells": ordered,
    }
    write_json(out / "results.json", results)
    write_text(out / "results.csv", _csv(ordered))
    many = [(len(settings.routers), "router"), (settings.seeds, "seed")]
    routers = ", ".join(f"{n} {what}{'' if n == 1 else 's'}" for n, what in many) + f", k = {settings.network.k}"
    write_text(out / "comparison.svg", draw(summary, f"{settings.data}: {routers}"))


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    keys = ["router", "depth", "seed", *(column.key for column in COLUMNS)]
    keys += ["interference_worst", "min_load_share", "trials"]
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

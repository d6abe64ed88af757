"""Run a comparison cell by cell; a run that was killed goes on where it stopped."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spectralmoe.compare.cell import run_cell
from spectralmoe.compare.columns import COLUMNS, summarise, summary_json
from spectralmoe.compare.picture import draw
from spectralmoe.compare.settings import Cell, CompareSettings
from spectralmoe.compare.setup import Setup
from spectralmoe.compare.tuning import TRIED, tune_row
from spectralmoe.errors import UserError
from spectralmoe.files import read_json, write_json, write_text
from spectralmoe.machine import describe_machine
from spectralmoe.training.data import ImageData
from spectralmoe.training.loop import Watcher
from spectralmoe.training.network import CHECKPOINT
from spectralmoe.training.run_folder import run_folder

__all__ = ["run"]

WRITES = ("results.json", "results.csv", "comparison.svg", TRIED, "models")


def run(
    settings: CompareSettings, data: ImageData, out: Path, device: torch.device, watch: Watcher
) -> list[dict[str, Any]]:
    """Run all cells of ``settings`` that ``out`` does not hold yet, and write its results.

    ``out`` holds ``settings.json``, ``results.json`` and ``results.csv`` (rewritten after each cell),
    ``comparison.svg`` and ``models/CELL/``.

    Raises:
        UserError: as ``run_folder``; settings that cannot work; a damaged results file.
    """
    settings.check()
    if settings.train_size is not None:
        data = data.subset(settings.train_size)
    setup = Setup(settings, data, out, device)
    with run_folder(out, {**settings.model_dump(mode="json"), "images": data.fingerprint}, WRITES):
        rows = _finished(out)
        cells = settings.cells()
        tuned = [cell for cell in cells if cell.seed == settings.seed and settings.tune > 0]
        share = _Share(watch, len(tuned) + len(cells))
        for cell in tuned:
            tune_row(cell, setup, share.next())
        for cell in cells:
            progress = share.next()
            if cell not in rows or not (out / "models" / cell.name / "config.json").exists():
                text = f"{cell.router}, depth {cell.depth}, seed {cell.seed}"
                rows[cell] = run_cell(cell, setup, partial(progress, text))
                _write(setup, rows)
                (out / "models" / cell.name / CHECKPOINT).unlink(missing_ok=True)
        watch("done", 1.0)
        _write(setup, rows)
    return [rows[cell] for cell in cells]


class _Share:
    """Gives each job a watcher that knows its share of all work."""

    def __init__(self, watch: Watcher, jobs: int) -> None:
        self.watch, self.jobs, self.begun = watch, jobs, 0

    def next(self) -> Watcher:
        self.begun += 1
        begun = self.begun

        def watch_job(text: str, done: float) -> None:
            self.watch(f"{text} ({begun}/{self.jobs})", (begun - 1 + 0.9 * done) / self.jobs)

        return watch_job


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


def _write(setup: Setup, rows: Mapping[Cell, dict[str, Any]]) -> None:
    """The results so far, cells in the order of the grid."""
    settings, out = setup.settings, setup.out
    ordered = [rows[cell] for cell in settings.cells() if cell in rows]
    summary = summarise(ordered)
    results = {
        "settings": settings.model_dump(mode="json"),
        "machine": describe_machine(),
        "columns": {column.key: column.meaning for column in COLUMNS},
        "summary": summary_json(summary),
        "cells": ordered,
    }
    write_json(out / "results.json", results)
    write_text(out / "results.csv", _csv(ordered))
    routers = f"{len(settings.routers)} routers, {settings.seeds} seeds, k = {settings.network.k}"
    write_text(out / "comparison.svg", draw(summary, f"{settings.data}: {routers}"))


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    keys = ["router", "depth", "seed", *(column.key for column in COLUMNS)]
    keys += ["interference_worst", "min_load_share", "trials"]
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

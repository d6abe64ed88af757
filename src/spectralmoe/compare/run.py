"""Run a comparison cell by cell; a run that was killed goes on where it stopped."""

from __future__ import annotations

import csv
import fcntl
import io
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from spectralmoe.compare.cell import run_cell
from spectralmoe.compare.columns import COLUMNS, summarise, summary_json
from spectralmoe.compare.picture import draw
from spectralmoe.compare.settings import Cell, CompareSettings
from spectralmoe.compare.setup import Setup
from spectralmoe.compare.tuning import tune_row
from spectralmoe.errors import UserError
from spectralmoe.files import make_folder, read_json, remove_parts, write_json, write_text
from spectralmoe.training.data import ImageData

__all__ = ["Watcher", "run"]


class Watcher(Protocol):
    """Who is told how far a run has come."""

    def __call__(self, text: str, done: float) -> None:
        """``text`` is what runs now, ``done`` the share of all work, 0 to 1."""


def run(
    settings: CompareSettings, data: ImageData, out: Path, device: torch.device, watch: Watcher
) -> list[dict[str, Any]]:
    """Run all cells of ``settings`` that ``out`` does not hold yet, and write its results.

    ``out`` holds ``settings.json``, ``results.json`` and ``results.csv`` (rewritten after each cell),
    ``comparison.svg`` and ``models/CELL/``.

    Raises:
        UserError: ``out`` cannot be written, was made with other settings, or is in use by another run.
    """
    settings.check()
    if settings.train_size is not None:
        data = data.subset(settings.train_size)
    setup = Setup(settings, data, out, device)
    make_folder(out)
    with _only_run(out):
        _claim(settings, data, out)
        remove_parts(out)
        rows, cells = _finished(out), settings.cells()
        for cell, job, watch_job in _jobs(cells, setup, watch):
            if job == "tune":
                tune_row(cell, setup, watch_job)
            elif not any((row["router"], row["depth"], row["seed"]) == cell for row in rows):
                rows.append(
                    run_cell(cell, setup, partial(watch_job, f"{cell.router}, depth {cell.depth}, seed {cell.seed}"))
                )
                _write(settings, rows, cells, out)
        watch("done", 1.0)
        _write(settings, rows, cells, out)
    return rows


def _jobs(cells: Sequence[Cell], setup: Setup, watch: Watcher) -> Iterator[tuple[Cell, str, Watcher]]:
    """Tuning of each row first, then all cells; each job with a watcher that knows its share of all work."""
    rows = [cell for cell in cells if cell.seed == setup.settings.seed and setup.settings.tune > 0]
    jobs = [*((cell, "tune") for cell in rows), *((cell, "run") for cell in cells)]
    for index, (cell, job) in enumerate(jobs):

        def watch_job(text: str, done: float, index: int = index) -> None:
            watch(f"{text} ({index + 1}/{len(jobs)})", (index + 0.9 * done) / len(jobs))

        yield cell, job, watch_job


def _claim(settings: CompareSettings, data: ImageData, out: Path) -> None:
    """Write the settings of a new folder; refuse a folder that was made with others, or on other images."""
    path, wanted = out / "settings.json", {**settings.model_dump(mode="json"), "images": data.fingerprint}
    if not path.exists():
        write_json(path, wanted)
        return
    held = read_json(path)
    for key, old, new in _differences(held, wanted):
        raise UserError(
            f"{out} holds a comparison with {key} = {old}, not {new}; "
            "go on with the same settings or choose another --out"
        )


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(
                old.get(key), new.get(key), f"{prefix}{key}." if isinstance(new.get(key), dict) else f"{prefix}{key}"
            )
    elif old != new:
        yield prefix.rstrip("."), old, new


def _finished(out: Path) -> list[dict[str, Any]]:
    path = out / "results.json"
    if not path.exists():
        return []
    try:
        return list(read_json(path)["cells"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not the results file of a comparison; move it away or choose another --out"
        ) from error


def _write(settings: CompareSettings, rows: Sequence[dict[str, Any]], cells: Sequence[Cell], out: Path) -> None:
    """The results so far, cells in the order of the grid."""
    place = {tuple(cell): index for index, cell in enumerate(cells)}
    ordered = sorted(rows, key=lambda row: place[row["router"], row["depth"], row["seed"]])
    summary = summarise(ordered)
    results = {
        "settings": settings.model_dump(mode="json"),
        "machine": _machine(),
        "columns": {column.key: column.meaning for column in COLUMNS},
        "summary": summary_json(summary),
        "cells": ordered,
    }
    write_json(out / "results.json", results)
    write_text(out / "results.csv", _csv(ordered))
    title = f"{settings.data}: {len(summary)} rows, {settings.seeds} seeds, k = {settings.network.k}"
    write_text(out / "comparison.svg", draw(summary, title))


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    keys = [
        "router",
        "depth",
        "seed",
        *(column.key for column in COLUMNS),
        "interference_worst",
        "min_load_share",
        "trials",
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


@contextmanager
def _only_run(out: Path) -> Iterator[None]:
    """Hold the folder's lock: two runs in one folder would overwrite each other."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another comparison is running in {out}; wait for it or choose another --out") from error
        yield

"""Run a comparison cell by cell; a run that was killed goes on where it stopped, a finished one may grow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from spectralmoe.errors import UserError
from spectralmoe.experiments.compare.cell import run_cell
from spectralmoe.experiments.compare.columns import Row, columns_of
from spectralmoe.experiments.compare.outputs import WRITES, Shown, write_pictures, write_results
from spectralmoe.experiments.compare.settings import GROWS, Cell, CompareSettings
from spectralmoe.experiments.compare.setup import Setup
from spectralmoe.experiments.compare.tuning import TRY_KEYS, best_setting, candidates, try_candidate
from spectralmoe.experiments.grid import DIVERGED, CellJob, finished_cells, run_cells
from spectralmoe.experiments.run_folder import run_folder
from spectralmoe.files import write_json
from spectralmoe.presets import find_preset
from spectralmoe.saving import load
from spectralmoe.training.loop import Progress
from spectralmoe.training.network import CHECKPOINT
from spectralmoe.training.tasks import Task

__all__ = ["Compared", "run"]

CELLS, TRIES = "cells", "tries"


class Compared(NamedTuple):
    """What a folder holds after a run.

    Attributes:
        cells: all of them, those of earlier runs too, in the order of the grid.
        rows: the same as estimates.  shown: what the tables show of them.
        pictures: the files that were drawn.
        notes: what a user should know, a line each.
    """

    cells: list[dict[str, Any]]
    rows: list[Row]
    shown: Shown
    pictures: list[Path]
    notes: list[str]


def run(
    settings: CompareSettings,
    task: Task,
    out: Path,
    device: torch.device,
    progress: Progress,
    *,
    processes: int = 1,
    baseline: str | None = None,
    columns: Sequence[str] = (),
) -> Compared:
    """Run all cells of ``settings`` that ``out`` does not hold yet, and write its results.

    ``out`` holds ``settings.json``, ``cells/CELL.json``, ``models/CELL/`` and, collected from the cells,
    ``results.json``, ``results.csv``, ``summary.csv``, ``table.md``, ``table.tex`` and the pictures. Another run there
    may ask for more routers, depths and seeds.

    Args:
        processes: cells that run at a time, each on one thread; 1: one cell after the other, on all threads.
        baseline: the router that the others are compared with, seed by seed; by default the first.
        columns: keys of the columns in tables and pictures; by default all.

    Raises:
        UserError: as ``run_folder``; settings that cannot work; a damaged cell; an unknown baseline or column.
    """
    settings.check()
    setup = Setup(settings, task, out, device)
    claim = {**settings.model_dump(mode="json"), "images": task.fingerprint}
    with run_folder(out, claim, WRITES, grows=GROWS) as claimed:
        grown = CompareSettings.model_validate({**settings.model_dump(), **{key: claimed[key] for key in GROWS}})
        shown = Shown.of(columns, baseline, grown.routers, columns_of(task))
        done = finished_cells(out / CELLS, (*Cell._fields, "cpu"))
        tries = _tune(setup, processes, progress)
        jobs = _training(setup, done, tries)
        for name, cell in run_cells(out / CELLS, jobs, processes, progress):
            done[name] = cell
            write_results(out, grown, _ordered(grown, done), shown)
            (out / "models" / name / CHECKPOINT).unlink(missing_ok=True)
        progress("done", 1.0)
        cells = _ordered(grown, done)
        rows = write_results(out, grown, cells, shown)
        pictures, notes = write_pictures(out, rows, shown)
        try:
            pictures += task.pictures(_first_networks(out, cells), out)
        except UserError as error:
            notes = [*notes, str(error)]
        return Compared(cells, rows, shown, pictures, [*_divergences(cells), *dict.fromkeys(notes)])


def _first_networks(out: Path, cells: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, nn.Module]]:
    """Each row with its network of the first depth and seed that was trained."""
    first: dict[str, Cell] = {}
    for cell in cells:
        if DIVERGED not in cell:
            first.setdefault(cell["router"], Cell(*(cell[key] for key in Cell._fields)))
    for router, found in first.items():
        yield router, load(out / "models" / found.name, allow=find_preset(router).allow)


def _tune(setup: Setup, processes: int, progress: Progress) -> list[dict[str, Any]]:
    """Every candidate on every row, under the first seed; those that are there are not tried again."""
    settings, folder = setup.settings, setup.out / TRIES
    done = finished_cells(folder, TRY_KEYS)
    jobs = []
    for cell in settings.cells():
        for index, candidate in enumerate(candidates(settings.tune) if cell.seed == settings.seed else ()):
            about = {"router": cell.router, "depth": cell.depth, "candidate": index, **candidate._asdict()}
            job = CellJob(
                f"{cell.name}-try{index}",
                about,
                f"tuning {cell.router}, depth {cell.depth}",
                try_candidate,
                (cell, candidate, setup),
            )
            jobs += [job] if job.name not in done else []
    if jobs:
        done |= dict(run_cells(folder, jobs, processes, progress))
    tries = sorted(done.values(), key=lambda one: (one["router"], one["depth"], one["candidate"]))
    if tries:
        write_json(setup.out / "tuning.json", tries)
    return tries


def _training(setup: Setup, done: Mapping[str, dict[str, Any]], tries: Sequence[dict[str, Any]]) -> list[CellJob]:
    jobs = []
    for cell in setup.settings.cells():
        known, config = done.get(cell.name, {}), setup.out / "models" / cell.name / "config.json"
        if DIVERGED in known or (known and config.exists()):
            continue
        text = f"{cell.router}, depth {cell.depth}, seed {cell.seed}"
        arguments = (cell, best_setting(cell, tries, setup.task.metric), setup)
        jobs.append(CellJob(cell.name, cell._asdict(), text, run_cell, arguments))
    return jobs


def _ordered(settings: CompareSettings, done: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [done[cell.name] for cell in settings.cells() if cell.name in done]


def _divergences(cells: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"{cell['router']}, depth {cell['depth']}, seed {cell['seed']} diverged: {cell[DIVERGED]}"
        for cell in cells
        if DIVERGED in cell
    ]

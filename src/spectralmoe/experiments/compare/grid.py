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
from spectralmoe.experiments.grid import (
    DIVERGED,
    CellJob,
    Slice,
    Taken,
    collectable,
    finished_cells,
    missing,
    one_version,
    run_cells,
    where_it_ran,
)
from spectralmoe.experiments.remote import Remote
from spectralmoe.experiments.run_folder import run_folder
from spectralmoe.json_files import write_json
from spectralmoe.presets import find_preset
from spectralmoe.saving import load
from spectralmoe.training.loop import Progress
from spectralmoe.training.network import CHECKPOINT
from spectralmoe.training.tasks import Task

__all__ = ["Compared", "run", "take"]

CELLS, TRIES = "cells", "tries"


class Compared(NamedTuple):
    """The results that a folder holds after a run.

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
    processes: int | Remote = 1,
    baseline: str | None = None,
    columns: Sequence[str] = (),
    collect: bool = False,
) -> Compared:
    """Run all cells of ``settings`` that ``out`` does not hold yet, and write its results.

    ``out`` holds ``settings.json``, ``cells/CELL.json``, ``models/CELL/`` and, collected from the cells,
    ``results.json``, ``results.csv``, ``summary.csv``, ``table.md``, ``table.tex`` and the pictures. Another run there
    may ask for more routers, depths and seeds.

    Args:
        processes: cells that run at a time, each on one thread; 1: one cell after the other, on all threads. Or an
            engine on machines that share ``out``.
        baseline: the router that the others are compared with, seed by seed; by default the first.
        columns: keys of the columns in tables and pictures; by default all.
        collect: run nothing; the slices of ``take`` have run all cells.

    Raises:
        UserError: as ``run_folder``; settings that cannot work; a damaged cell; cells of several versions; cells that
            are not there when they are collected; an unknown baseline or column.
    """
    settings.check()
    setup = Setup(settings, task, out.resolve(), device)
    with run_folder(out, _claim(settings, task), WRITES, grows=GROWS) as claimed:
        grown = CompareSettings.model_validate({**settings.model_dump(), **{key: claimed[key] for key in GROWS}})
        shown = Shown.of(columns, baseline, grown.routers, columns_of(task))
        tries, done = _found(out)
        tuning = [job for job in _tuning(setup) if job.name not in tries]
        if collect:
            collectable(missing("tries", [job.name for job in tuning], len(_tuning(setup))))
        if tuning:
            tries |= dict(run_cells(out / TRIES, tuning, processes, progress))
        if tries:
            write_json(out / "tuning.json", _by_row(tries))
        training = _unfinished(setup, _training(setup, tries), done)
        if collect:
            collectable(missing("cells", [job.name for job in training], len(settings.cells())))
        for name, cell in _train(setup, training, processes, progress):
            done[name] = cell
            write_results(out, grown, _ordered(grown, done), shown)
        progress("done", 1.0)
        cells = _ordered(grown, done)
        rows = write_results(out, grown, cells, shown)
        pictures, notes = write_pictures(out, rows, shown)
        try:
            pictures += task.pictures(_first_networks(out, cells), out)
        except UserError as error:
            notes = [*notes, str(error)]
        return Compared(cells, rows, shown, pictures, [*_divergences(cells), *dict.fromkeys(notes)])


def take(
    settings: CompareSettings,
    task: Task,
    out: Path,
    device: torch.device,
    progress: Progress,
    *,
    part: Slice,
    processes: int = 1,
) -> Taken:
    """Run a slice of the tries and, when those of all slices are there, of the cells.

    Other slices may run at the same time, on other machines that share ``out`` too; ``run(collect=True)`` puts together
    what they left.

    Raises:
        UserError: as ``run``.
    """
    settings.check()
    setup = Setup(settings, task, out.resolve(), device)
    with run_folder(out, _claim(settings, task), WRITES, grows=GROWS, shared=True):
        tries, done = _found(out)
        tuning = _tuning(setup)
        tried = [job for job in part.of(tuning) if job.name not in tries]
        if tried:
            tries |= dict(run_cells(out / TRIES, tried, processes, progress))
        tries |= finished_cells(out / TRIES, TRY_KEYS)  # those of other slices
        if lacks := missing("tries", [job.name for job in tuning if job.name not in tries], len(tuning)):
            return Taken(len(tried), lacks)
        training = _unfinished(setup, part.of(_training(setup, tries)), done)
        return Taken(len(tried) + len(list(_train(setup, training, processes, progress))))


def _claim(settings: CompareSettings, task: Task) -> dict[str, Any]:
    return {**settings.model_dump(mode="json"), "images": task.fingerprint}


def _found(out: Path) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Tries and cells by name, all of one version."""
    tries, cells = finished_cells(out / TRIES, TRY_KEYS), finished_cells(out / CELLS, (*Cell._fields, "cpu"))
    one_version(out, [*tries.values(), *cells.values()])
    return tries, cells


def _first_networks(out: Path, cells: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, nn.Module]]:
    """Each row with its network of the first depth and seed that was trained."""
    first: dict[str, Cell] = {}
    for cell in cells:
        if DIVERGED not in cell:
            first.setdefault(cell["router"], Cell(*(cell[key] for key in Cell._fields)))
    for router, found in first.items():
        yield router, load(out / "models" / found.name, allow=find_preset(router).allow)


def _tuning(setup: Setup) -> list[CellJob]:
    """Every candidate on every row, under the first seed."""
    settings, jobs = setup.settings, []
    for cell in settings.cells():
        for index, candidate in enumerate(candidates(settings.tune) if cell.seed == settings.seed else ()):
            about = {"router": cell.router, "depth": cell.depth, "candidate": index, **candidate._asdict()}
            text = f"tuning {cell.router}, depth {cell.depth}"
            jobs.append(CellJob(f"{cell.name}-try{index}", about, text, try_candidate, (cell, candidate, setup)))
    return jobs


def _by_row(tries: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(tries.values(), key=lambda one: (one["router"], one["depth"], one["candidate"]))


def _training(setup: Setup, tries: Mapping[str, dict[str, Any]]) -> list[CellJob]:
    """Every cell, with the best setting of its row."""
    jobs, known = [], _by_row(tries)
    for cell in setup.settings.cells():
        text = f"{cell.router}, depth {cell.depth}, seed {cell.seed}"
        arguments = (cell, best_setting(cell, known, setup.task.metric), setup)
        jobs.append(CellJob(cell.name, cell._asdict(), text, run_cell, arguments))
    return jobs


def _unfinished(setup: Setup, jobs: Sequence[CellJob], done: Mapping[str, dict[str, Any]]) -> list[CellJob]:
    """Those whose cell is not in ``done``, or without its network."""
    models = setup.out / "models"
    return [
        job
        for job in jobs
        if job.name not in done or (DIVERGED not in done[job.name] and not (models / job.name / "config.json").exists())
    ]


def _train(
    setup: Setup, jobs: Sequence[CellJob], workers: int | Remote, progress: Progress
) -> Iterator[tuple[str, dict[str, Any]]]:
    cells = setup.out / CELLS
    if jobs:
        one_version(cells, [*finished_cells(cells, ()).values(), where_it_ran()])
    for job in jobs:
        (cells / f"{job.name}.json").unlink(missing_ok=True)  # its network was taken away
    for name, cell in run_cells(cells, jobs, workers, progress):
        (setup.out / "models" / name / CHECKPOINT).unlink(missing_ok=True)
        yield name, cell


def _ordered(settings: CompareSettings, done: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [done[cell.name] for cell in settings.cells() if cell.name in done]


def _divergences(cells: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"{cell['router']}, depth {cell['depth']}, seed {cell['seed']} diverged: {cell[DIVERGED]}"
        for cell in cells
        if DIVERGED in cell
    ]

"""Run the steps of a card: cells that are there are kept, others are run, and everything is written from the cells."""

from __future__ import annotations

import shutil
import sys
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from spectralmoe.draw.figure import write_figures
from spectralmoe.errors import UserError
from spectralmoe.experiments.cards.plan import Card, Cells, Desk, Step, Tuning
from spectralmoe.experiments.cards.results import result_lines
from spectralmoe.experiments.cards.steps import (
    Found,
    cells_of,
    chosen,
    find_step,
    jobs_for,
    name_of,
    running,
    stored,
    text_of,
)
from spectralmoe.experiments.evidence import check_lines
from spectralmoe.experiments.grid import DIVERGED, Slice, Taken, collectable, missing, run_cells
from spectralmoe.experiments.remote import Remote
from spectralmoe.experiments.run_folder import run_folder
from spectralmoe.files import make_folder, write_text
from spectralmoe.json_files import read_json, write_json
from spectralmoe.machine import cpu_model, describe_machine
from spectralmoe.training.loop import Progress

__all__ = ["check_card", "find_card", "run_card", "take_card", "write_card"]

RUNNING = "cells"


def find_card(folder: Path, *, quick: bool = False) -> Card:
    """``FULL`` or ``QUICK`` of ``folder/plan.py``, whose modules are found by the processes of the run, too.

    Raises:
        UserError: no such plan.
    """
    path, name = folder / "plan.py", "QUICK" if quick else "FULL"
    if not path.is_file():
        raise UserError(f"{path}: no such file; a card is a folder with a plan.py, such as papers/sr-moe")
    if str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))
    module = import_module("plan")
    if Path(module.__file__ or "").resolve() != path.resolve():
        raise UserError(f"{path}: another module called plan is loaded ({module.__file__}); run one card a process")
    card = getattr(module, name, None)
    if not isinstance(card, Card):
        raise UserError(f"{path} has no card called {name}")
    return card


def run_card(
    card: Card, out: Path, work: Path, processes: int | Remote, progress: Progress, *, collect: bool = False
) -> tuple[int, list[str]]:
    """Run what ``out`` does not hold yet, and write RESULTS.md and the figures.

    Args:
        processes: cells that run at a time, each on one thread, or an engine on machines that share ``out`` and
            ``work``.
        collect: run nothing; the slices of ``take_card`` have run all cells.

    Returns:
        How many cells were run, and what a user should know, a line each.

    Raises:
        UserError: as ``run_folder``; a damaged file; a row without settings, since its tuning diverged; cells of
            several versions; cells that are not there when they are collected.
    """
    with _held(card, out):
        if collect:
            _refuse_gaps(card, out)
        make_folder(work)
        write_json(out / "machine.json", {**describe_machine(), "threads": 1})  # of a cell, however many run at once
        count = sum(_run_step(step, card, _Run(out, work, processes, progress)) for step in card.steps)
        progress("done", 1.0)
        shutil.rmtree(out / RUNNING, ignore_errors=True)  # all cells are in their files now
        return count, [*card.notes, *write_card(card, out, work)]


def take_card(card: Card, out: Path, work: Path, processes: int, progress: Progress, *, part: Slice) -> Taken:
    """Run a slice of each step; the steps after a tuning wait until all slices of it are there.

    Other slices may run at the same time, on other machines that share ``out`` and ``work`` too;
    ``run_card(collect=True)`` puts together what they left.

    Raises:
        UserError: as ``run_card``.
    """
    count, tuned = 0, dict[str, Any]()
    with _held(card, out, shared=True):
        make_folder(work)
        for step in card.steps:
            left = find_step(step, out).left()
            jobs = jobs_for(step, [one for one in part.of(cells_of(step)) if one in left], Desk(work.resolve(), tuned))
            count += len(jobs)
            if jobs:
                list(run_cells(running(step, out), jobs, processes, progress))
            if isinstance(step, Tuning):
                found = find_step(step, out)  # with what other slices have left there
                if lacks := _gaps(found):
                    return Taken(count, lacks)
                tuned[step.file] = found.content()
    return Taken(count)


def _held(card: Card, out: Path, *, shared: bool = False) -> AbstractContextManager[dict[str, Any]]:
    writes = [f"{step.file}.json" for step in card.steps]
    return run_folder(out, dict(card.settings), writes, adds=card.added, shared=shared)


def _refuse_gaps(card: Card, out: Path) -> None:
    for step in card.steps:
        collectable(_gaps(find_step(step, out)))


def _gaps(found: Found) -> str:
    return missing(f"cells of {found.step.file}", [name_of(one) for one in found.left()], len(cells_of(found.step)))


def write_card(card: Card, out: Path, work: Path) -> list[str]:
    """Write RESULTS.md and the figures from the cells that ``out`` holds; what a user should know, a line each.

    Raises:
        UserError: a damaged file; a folder without cells.
    """
    held = {step.file: stored(step, out) for step in card.steps}
    if not any(held[step.file] for step in card.steps if isinstance(step, Cells)):
        raise UserError(f"{out} holds no cells of this card; run it without --draw")
    lines = result_lines(card.title, card.about, card.sections(held))
    write_text(out / "RESULTS.md", "\n".join(lines) + "\n")
    if card.pictures is not None:
        card.pictures(out, Desk(work, chosen(card, out)))
    _, notes = write_figures(out, card.figures(held))
    failed = [cell for cells in held.values() if isinstance(cells, list) for cell in cells if DIVERGED in cell]
    return [*(f"diverged: {text_of(cell)}: {cell[DIVERGED]}" for cell in failed), *notes]


def check_card(card: Card, out: Path, processes: int, progress: Progress) -> list[str]:
    """Run the cells of ``card.check`` again; a line for each mean: whether the interval of the stored cells holds it.

    Raises:
        UserError: the card checks nothing; there are no stored cells.
    """
    if card.check is None:
        raise UserError("this form of the card has nothing to check")
    step, tuned = card.check.cells, chosen(card, out)
    stored = read_json(out / f"{step.file}.json")
    with TemporaryDirectory() as folder:
        make_folder(work := Path(folder) / "work")
        jobs = jobs_for(step, step.wanted, Desk(work, tuned))
        again = [cell for _, cell in run_cells(Path(folder) / RUNNING, jobs, processes, progress)]
    return [f"on {cpu_model()}:", *check_lines(stored, again, card.check.groups, card.check.keys)]


class _Run(NamedTuple):
    out: Path
    work: Path
    processes: int | Remote
    progress: Progress


def _run_step(step: Step, card: Card, run: _Run) -> int:
    """Run what is missing of a step, then collect its cells in its file; how many were run."""
    found = find_step(step, run.out)
    jobs = jobs_for(step, found.left(), Desk(run.work.resolve(), chosen(card, run.out)))
    if jobs:
        done = run_cells(running(step, run.out), jobs, run.processes, run.progress)
        found = found._replace(done={**found.done, **dict(done)})
    if found.done:
        write_json(run.out / f"{step.file}.json", found.content())
    return len(jobs)

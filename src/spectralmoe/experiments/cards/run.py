"""Run the steps of a card: what is there is kept, what was killed goes on, and everything is written from the cells."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from spectralmoe.draw.figure import write_figures
from spectralmoe.errors import UserError
from spectralmoe.experiments.cards.plan import Card, Cells, Desk, Identity, Share, Step, Tuning
from spectralmoe.experiments.cards.results import result_lines
from spectralmoe.experiments.evidence import check_lines
from spectralmoe.experiments.grid import DIVERGED, CellJob, finished_cells, run_cells
from spectralmoe.experiments.run_folder import run_folder
from spectralmoe.files import make_folder, read_json, write_json, write_text
from spectralmoe.machine import cpu_model, describe_machine
from spectralmoe.training.loop import Progress

__all__ = ["check_card", "find_card", "run_card", "write_card"]

RUNNING = "cells"
"""Folder of the cells of a step that has not ended; when it has, they are in its file."""


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


def run_card(card: Card, out: Path, work: Path, processes: int, progress: Progress) -> tuple[int, list[str]]:
    """Run what ``out`` does not hold yet, and write RESULTS.md and the figures.

    Returns:
        How many cells were run, and what a user should know, a line each.

    Raises:
        UserError: as ``run_folder``; a damaged file; a row without settings, since its tuning diverged.
    """
    with run_folder(out, dict(card.settings), [f"{step.file}.json" for step in card.steps], adds=card.added):
        make_folder(work)
        write_json(out / "machine.json", describe_machine())
        count = sum(_run_step(step, card, _Run(out, work, processes, progress)) for step in card.steps)
        progress("done", 1.0)
        with suppress(OSError):
            (out / RUNNING).rmdir()
        return count, [*card.notes, *write_card(card, out, work)]


def write_card(card: Card, out: Path, work: Path) -> list[str]:
    """Write RESULTS.md and the figures from the cells that ``out`` holds; what a user should know, a line each.

    Raises:
        UserError: a damaged file; a folder without cells.
    """
    stored = {step.file: _content(step, out) for step in card.steps}
    if not any(stored[step.file] for step in card.steps if isinstance(step, Cells)):
        raise UserError(f"{out} holds no cells of this card; run it without --draw")
    lines = result_lines(card.title, card.about, card.sections(stored))
    write_text(out / "RESULTS.md", "\n".join(lines) + "\n")
    if card.pictures is not None:
        card.pictures(out, Desk(work, _tuned(card, out)))
    _, notes = write_figures(out, card.figures(stored))
    failed = [cell for cells in stored.values() if isinstance(cells, list) for cell in cells if DIVERGED in cell]
    return [*(f"diverged: {_named(cell)}: {cell[DIVERGED]}" for cell in failed), *notes]


def check_card(card: Card, out: Path, processes: int, progress: Progress) -> list[str]:
    """Run the cells of ``card.check`` again; a line for each mean: whether the interval of the stored cells holds it.

    Raises:
        UserError: the card checks nothing; there are no stored cells.
    """
    if card.check is None:
        raise UserError("this form of the card has nothing to check")
    step, tuned = card.check.cells, _tuned(card, out)
    stored = read_json(out / f"{step.file}.json")
    with TemporaryDirectory() as folder:
        make_folder(work := Path(folder) / "work")
        jobs = _jobs(step, step.wanted, Desk(work, tuned))
        again = [cell for _, cell in run_cells(Path(folder) / RUNNING, jobs, processes, progress)]
    return [f"on {cpu_model()}:", *check_lines(stored, again, card.check.groups, card.check.keys)]


class _Run(NamedTuple):
    out: Path
    work: Path
    processes: int
    progress: Progress


def _run_step(step: Step, card: Card, run: _Run) -> int:
    """Run what is missing of a step, then collect its cells in its file; how many were run."""
    running, known = run.out / RUNNING / step.file, _content(step, run.out)
    missing = _missing(step, known)
    done = finished_cells(running, ("cpu",)) if missing else {}
    jobs = [job for job in _jobs(step, missing, Desk(run.work, _tuned(card, run.out))) if job.name not in done]
    if jobs:
        done |= dict(run_cells(running, jobs, run.processes, run.progress))
    if done:
        write_json(run.out / f"{step.file}.json", _collected(step, known, missing, done))
    shutil.rmtree(running, ignore_errors=True)
    return len(jobs)


def _missing(step: Step, known: Any) -> list[Identity]:
    if isinstance(step, Tuning):
        return [{"row": row} for row in step.rows if row not in known]
    present = {_key(cell, step.wanted[0]) for cell in known} if step.wanted else set()
    return [identity for identity in step.wanted if _key(identity, identity) not in present]


def _collected(step: Step, known: Any, missing: Sequence[Identity], done: Mapping[str, dict[str, Any]]) -> Any:
    """The content of the step's file with the cells that were missing, in their order."""
    cells = [done[_name(identity)] for identity in missing if _name(identity) in done]
    if isinstance(step, Cells):
        return [*known, *cells]
    for cell in cells:
        if DIVERGED in cell:
            raise UserError(f"tuning of {cell['row']} diverged: {cell[DIVERGED]}")
        known |= cell["settings"]
    return known


def _jobs(step: Step, wanted: Sequence[Identity], desk: Desk) -> list[CellJob]:
    if isinstance(step, Cells):
        return [CellJob(_name(one), one, f"{step.file}: {_named(one)}", step.measure, (one, desk)) for one in wanted]
    return [CellJob(_name(one), one, f"tuning {one['row']}", _tune, (step.tune, one["row"], desk)) for one in wanted]


def _tune(tune: Any, row: str, desk: Desk, progress: Share) -> dict[str, Any]:
    return {"settings": tune(row, desk, progress)}


def _tuned(card: Card, out: Path) -> dict[str, Any]:
    return {step.file: _content(step, out) for step in card.steps if isinstance(step, Tuning)}


def _content(step: Step, out: Path) -> Any:
    """What the step's file holds; nothing where there is none.

    Raises:
        UserError: it is no list of cells, or no mapping of settings.
    """
    path, kind = out / f"{step.file}.json", list if isinstance(step, Cells) else dict
    content = read_json(path) if path.exists() else kind()
    if not isinstance(content, kind):
        raise UserError(f"{path} is not a file of this card; move it away or choose another --out")
    return content


def _key(cell: Mapping[str, Any], identity: Identity) -> tuple[Any, ...]:
    return tuple(cell.get(key) for key in identity)


def _name(identity: Identity) -> str:
    return re.sub(r"[^A-Za-z0-9+_.-]", "_", "-".join(str(value) for value in identity.values()))


def _named(cell: Mapping[str, Any]) -> str:
    """``row, data, depth 2, seed 0``."""
    return ", ".join(
        value if isinstance(value, str) else f"{key} {value}" for key, value in cell.items() if key in _SHOWN
    )


_SHOWN = ("row", "variant", "task", "dataset", "shots", "depth", "seed")

"""A grid of cells, each a file of its own that is whole or absent.

A cell is one measurement: a JSON object with what tells it from the others (row, depth, seed), where it ran, and what
was measured. The process that measured a cell writes its file, so a run that is killed loses the cells that were
running and no others; a finished cell is never run again, and a grid may grow in the same folder.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import spectralmoe
from spectralmoe.errors import UserError
from spectralmoe.experiments.workers import Job, run_jobs
from spectralmoe.files import make_folder, read_json, write_json
from spectralmoe.machine import cpu_model
from spectralmoe.training.loop import Diverged, Progress

__all__ = ["DIVERGED", "CellJob", "finished_cells", "run_cells", "where_it_ran"]

DIVERGED = "diverged"
"""The key of a cell that has no measures, since its training diverged; its value says how."""


class CellJob(NamedTuple):
    """A cell to be measured by ``function(*arguments, progress)``, which returns its measures.

    Attributes:
        name: of its file.  about: what tells it from the other cells.
        text: what is shown while it runs.
    """

    name: str
    about: Mapping[str, Any]
    text: str
    function: Callable[..., Mapping[str, Any]]
    arguments: tuple[Any, ...]


def finished_cells(folder: Path, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The cells in ``folder`` by the names of their files.

    Args:
        keys: what every cell must have.

    Raises:
        UserError: a file that is no cell of this kind.
    """
    cells = {}
    for path in sorted(folder.glob("*.json")):
        cell = read_json(path)
        if not isinstance(cell, dict) or not all(key in cell for key in keys):
            raise UserError(f"{path} is no cell of this run; remove it to run the cell again")
        cells[path.stem] = cell
    return cells


def run_cells(
    folder: Path, jobs: Sequence[CellJob], processes: int, progress: Progress
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of each cell, as its file is there.

    A cell whose training diverges has the key "diverged" in the place of measures, and the others go on.

    Raises:
        UserError: two cells of one name; as ``run_jobs``.
    """
    make_folder(folder)
    names: set[str] = set()
    for job in jobs:
        if job.name in names:
            raise UserError(f"two rows would share the file {folder / job.name}.json: {dict(job.about)}; rename one")
        names.add(job.name)
    yield from run_jobs([Job(job.name, job.text, _measure, (folder, job)) for job in jobs], processes, progress)


def where_it_ran() -> dict[str, Any]:
    """Processor, threads and versions, which every cell records.

    >>> list(where_it_ran())
    ['cpu', 'threads', 'versions']
    """
    versions = {"python": platform.python_version(), "torch": torch.__version__, "spectralmoe": spectralmoe.__version__}
    return {"cpu": cpu_model(), "threads": torch.get_num_threads(), "versions": versions}


def _measure(folder: Path, job: CellJob, progress: Callable[[float], None]) -> dict[str, Any]:
    """Measure one cell and write its file; what comes back is what the file holds."""
    measures: Mapping[str, Any]
    try:
        measures = job.function(*job.arguments, progress)
    except Diverged as error:
        measures = {DIVERGED: str(error)}
    path = folder / f"{job.name}.json"
    write_json(path, {**job.about, **where_it_ran(), **measures})
    cell: dict[str, Any] = read_json(path)
    return cell

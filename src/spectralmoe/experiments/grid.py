"""A grid of cells, each in a file of its own that is written completely or not at all.

A cell is one measurement: a JSON object with what tells it from the others (row, depth, seed), where it ran, and what
was measured. The process that measured a cell writes its file, so a run that is killed loses the cells that were
running and no others; a finished cell is never run again, and a grid may grow in the same folder. Where several
machines share the folder, each may run some of the cells.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import torch

from spectralmoe.errors import UserError
from spectralmoe.experiments.remote import Remote, run_elsewhere
from spectralmoe.experiments.workers import Job, run_jobs
from spectralmoe.files import locked, make_folder
from spectralmoe.json_files import read_json, write_json
from spectralmoe.machine import cpu_model, versions
from spectralmoe.training.loop import Diverged, Progress

__all__ = [
    "DIVERGED",
    "CellJob",
    "Slice",
    "Taken",
    "collectable",
    "finished_cells",
    "missing",
    "one_version",
    "run_cells",
    "where_it_ran",
]

T = TypeVar("T")

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


@dataclass(frozen=True, slots=True)
class Slice:
    """The cells ``place``, ``place + parts``, ``place + 2 parts``, ... of a grid, counted from 1."""

    place: int
    parts: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of text such as "3/16".

        Raises:
            UserError: no such text.
        """
        place, slash, parts = text.partition("/")
        if not (slash and place.isdecimal() and parts.isdecimal() and 1 <= int(place) <= int(parts)):
            raise UserError(f"--take {text} is no slice I/N such as 3/16, with I from 1 to N")
        return cls(int(place), int(parts))

    def of(self, cells: Sequence[T]) -> Sequence[T]:
        """The slice of all ``cells`` that are wanted, finished ones among them, so that slices do not move.

        >>> Slice.parse("2/3").of("abcdefg")
        'be'
        """
        return cells[self.place - 1 :: self.parts]

    def __str__(self) -> str:
        return f"{self.place}/{self.parts}"


class Taken(NamedTuple):
    """The result of a slice.

    Attributes:
        cells: how many were run.
        missing: what the next phase waits for, in words; "": nothing.
    """

    cells: int
    missing: str = ""


def missing(what: str, lacking: Sequence[str], wanted: int) -> str:
    """A sentence that names the missing cells; "" if none is missing.

    >>> missing("cells", ["a-seed0", "a-seed1"], 8), missing("cells", [], 8)
    ('2 of 8 cells are not there, the first a-seed0', '')
    """
    return f"{len(lacking)} of {wanted} {what} are not there, the first {lacking[0]}" if lacking else ""


def collectable(missing: str) -> None:
    """Refuse to collect a grid of which something is ``missing``.

    Raises:
        UserError: something is.
    """
    if missing:
        raise UserError(f"nothing was collected: {missing}; run the slices (--take) that lack, then --collect")


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


def one_version(folder: Path, cells: Iterable[Mapping[str, Any]]) -> None:
    """Refuse to put together ``cells`` of several versions.

    Raises:
        UserError: the versions that differ, and where their cells ran.
    """
    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        for name, version in cell.get("versions", {}).items():
            found.setdefault(name, {}).setdefault(version, cell.get("host", "a machine"))
    for name, hosts in found.items():
        if len(hosts) > 1:
            listed = " and ".join(f"{name} {version} ({host})" for version, host in hosts.items())
            raise UserError(
                f"{folder} holds cells of {listed}, and results of several versions are not mixed: move the files of "
                "one away, and run them again with the other"
            )


def run_cells(
    folder: Path, jobs: Sequence[CellJob], workers: int | Remote, progress: Progress
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of each cell, as its file is there.

    A cell whose file is there by then is not run. One whose training diverges has the key "diverged" in the place of
    measures, and the others go on.

    Args:
        workers: processes here, as ``run_jobs`` takes them, or an engine on machines that share ``folder``.

    Raises:
        UserError: two cells of one name; cells of other versions are there; as ``run_jobs`` and ``run_elsewhere``.
    """
    make_folder(folder)
    names: set[str] = set()
    for job in jobs:
        if job.name in names:
            raise UserError(f"two rows would share the file {folder / job.name}.json: {dict(job.about)}; rename one")
        names.add(job.name)
    if jobs:
        one_version(folder, [*finished_cells(folder, ()).values(), where_it_ran()])
    place = folder if isinstance(workers, int) else folder.resolve()
    plain = [Job(job.name, job.text, _measure, (place, job)) for job in jobs]
    if isinstance(workers, int):
        yield from run_jobs(plain, workers, progress)
    else:
        yield from run_elsewhere(place, plain, workers, progress)


def where_it_ran() -> dict[str, Any]:
    """Machine, processor, threads and versions, which every cell records.

    >>> list(where_it_ran())
    ['host', 'cpu', 'threads', 'versions']
    """
    return {
        "host": platform.node(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _measure(folder: Path, job: CellJob, progress: Callable[[float], None]) -> dict[str, Any]:
    """Measure one cell and write its file; what comes back is what the file holds."""
    path = folder / f"{job.name}.json"
    with locked(folder / f".{job.name}.lock"):
        if not path.exists():
            write_json(path, {**job.about, **where_it_ran(), **_measures(job, progress)})
    cell: dict[str, Any] = read_json(path)
    return cell


def _measures(job: CellJob, progress: Callable[[float], None]) -> Mapping[str, Any]:
    try:
        return job.function(*job.arguments, progress)
    except Diverged as error:
        return {DIVERGED: str(error)}

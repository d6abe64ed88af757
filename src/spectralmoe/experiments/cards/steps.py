"""One step of a card: its cells, the stored ones, the jobs for the others, and the content of its file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spectralmoe.errors import UserError
from spectralmoe.experiments.cards.plan import Card, Cells, Desk, Identity, Share, Step, Tuning
from spectralmoe.experiments.grid import DIVERGED, CellJob, finished_cells, one_version
from spectralmoe.json_files import read_json

__all__ = ["Found", "cells_of", "chosen", "find_step", "jobs_for", "name_of", "running", "stored", "text_of"]

_SHOWN = ("row", "variant", "task", "dataset", "shots", "depth", "seed")


class Found(NamedTuple):
    """The state of a step: the content of its file, the cells missing there, and the cell files by name."""

    step: Step
    known: Any
    lacking: list[Identity]
    done: Mapping[str, dict[str, Any]]

    def left(self) -> list[Identity]:
        """The cells that have to be run."""
        return [identity for identity in self.lacking if name_of(identity) not in self.done]

    def content(self) -> Any:
        """The content of the step's file with the cells beside it, in their order.

        Raises:
            UserError: a row without settings, since its tuning diverged.
        """
        cells = [self.done[name_of(identity)] for identity in self.lacking if name_of(identity) in self.done]
        if isinstance(self.step, Cells):
            return [*self.known, *cells]
        settings = dict(self.known)
        for cell in cells:
            if DIVERGED in cell:
                raise UserError(f"tuning of {cell['row']} diverged: {cell[DIVERGED]}")
            settings |= cell["settings"]
        return settings


def find_step(step: Step, out: Path) -> Found:
    """The state of a step in the folder ``out``.

    Raises:
        UserError: a damaged file; cells of several versions beside it.
    """
    known = stored(step, out)
    if isinstance(step, Tuning):
        lacking = [identity for identity in cells_of(step) if identity["row"] not in known]
    else:
        present = {_key(cell, step.wanted[0]) for cell in known} if step.wanted else set()
        lacking = [identity for identity in step.wanted if _key(identity, identity) not in present]
    done = finished_cells(running(step, out), ("cpu",)) if lacking else {}
    one_version(running(step, out), done.values())
    return Found(step, known, lacking, done)


def cells_of(step: Step) -> Sequence[Identity]:
    """All cells of a step, those that are there among them."""
    return [{"row": row} for row in step.rows] if isinstance(step, Tuning) else step.wanted


def jobs_for(step: Step, cells: Sequence[Identity], desk: Desk) -> list[CellJob]:
    """The jobs that run ``cells`` of a step."""
    if isinstance(step, Cells):
        return [CellJob(name_of(one), one, f"{step.file}: {text_of(one)}", step.measure, (one, desk)) for one in cells]
    return [CellJob(name_of(one), one, f"tuning {one['row']}", _tune, (step.tune, one["row"], desk)) for one in cells]


def running(step: Step, out: Path) -> Path:
    """Folder of the cells of a step that has not ended; when it has, they are in its file."""
    return out / "cells" / step.file


def stored(step: Step, out: Path) -> Any:
    """The content of the step's file; empty if there is none.

    Raises:
        UserError: it is no list of cells, or no mapping of settings.
    """
    path, kind = out / f"{step.file}.json", list if isinstance(step, Cells) else dict
    content = read_json(path) if path.exists() else kind()
    if not isinstance(content, kind):
        raise UserError(f"{path} is not a file of this card; move it away or choose another --out")
    return content


def chosen(card: Card, out: Path) -> dict[str, Any]:
    """The settings that the files of the tunings hold: file -> row -> settings."""
    return {step.file: stored(step, out) for step in card.steps if isinstance(step, Tuning)}


def name_of(cell: Identity) -> str:
    """The name of a cell's file."""
    return re.sub(r"[^A-Za-z0-9+_.-]", "_", "-".join(str(value) for value in cell.values()))


def text_of(cell: Mapping[str, Any]) -> str:
    """``row, data, depth 2, seed 0``."""
    return ", ".join(
        value if isinstance(value, str) else f"{key} {value}" for key, value in cell.items() if key in _SHOWN
    )


def _tune(tune: Any, row: str, desk: Desk, progress: Share) -> dict[str, Any]:
    return {"settings": tune(row, desk, progress)}


def _key(cell: Mapping[str, Any], identity: Identity) -> tuple[Any, ...]:
    return tuple(cell.get(key) for key in identity)

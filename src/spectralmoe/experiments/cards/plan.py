"""A card as plain values: steps that tune and measure, and how their cells become tables and figures."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from spectralmoe.draw.panels import Panel
from spectralmoe.experiments.cards.results import Section
from spectralmoe.files import part_folder
from spectralmoe.json_files import read_json, write_json
from spectralmoe.saving import load, save

__all__ = ["Card", "Cells", "Check", "Desk", "Identity", "Share", "Step", "Stored", "Tuning"]

Identity = Mapping[str, Any]
"""What tells a cell from the others of its file: {"row": "linear", "depth": 2, "seed": 0}."""
Share = Callable[[float], None]
Stored = Mapping[str, Any]
"""File name without .json -> its content."""
NOTES = "notes.json"


@dataclass(frozen=True, slots=True)
class Desk:
    """The folder and the settings that a step may use.

    Attributes:
        work: folder of the trained networks.
        tuned: the settings that were chosen so far: file of a ``Tuning`` -> row -> settings.
    """

    work: Path
    tuned: Mapping[str, Mapping[str, Any]]

    def network(self, name: str, train: Callable[[], tuple[nn.Module, Any]]) -> tuple[nn.Module, Any]:
        """The network kept under ``name``, in evaluation mode, and the JSON value that its training returned.

        One that is not there is trained, as ``kept`` does it.
        """

        def fill(place: Path) -> None:
            model, notes = train()
            save(model, place)
            write_json(place / NOTES, notes)

        place = self.kept(name, fill)
        return load(place).eval(), read_json(place / NOTES)

    def kept(self, name: str, fill: Callable[[Path], None]) -> Path:
        """The folder kept under ``name``.

        If it is not there, one process fills it while the others that need it wait; it appears whole.
        """
        place = self.work / name
        with (self.work / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not place.exists():
                with part_folder(self.work) as part:
                    fill(part / name)
                    (part / name).rename(place)
        return place


@dataclass(frozen=True, slots=True)
class Tuning:
    """A step that chooses settings once a row, kept in FILE.json as row -> settings.

    Attributes:
        tune: (row, desk, progress) -> the settings of the row, and perhaps of its variants, by name.
    """

    file: str
    rows: Sequence[str]
    tune: Callable[[str, Desk, Share], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Cells:
    """A step that measures cells, kept in FILE.json as a list.

    Attributes:
        wanted: the cells, in the order in which they are run; all with the same keys.
        measure: (identity, desk, progress) -> measures.
    """

    file: str
    wanted: Sequence[Identity]
    measure: Callable[[Identity, Desk, Share], Mapping[str, Any]]


Step = Tuning | Cells


@dataclass(frozen=True, slots=True)
class Check:
    """A few cells that ``--check`` runs again, trained anew.

    Attributes:
        cells: which, and how they are measured; compared with the cells in its file.
        groups: keys that tell apart the rows whose means are compared.  keys: of the measures.
    """

    cells: Cells
    groups: Sequence[str]
    keys: Sequence[str]


@dataclass(frozen=True, slots=True)
class Card:
    """One form of a card, the full or the quick one.

    Attributes:
        title: of RESULTS.md.  about: what stands below it.
        settings: what would change cells that are there: sizes, epochs.
        added: names of settings that a folder may lack, since they concern steps that were added to the plan later.
        steps: in the order in which they run; several may share a file.
        sections: stored cells -> the tables of RESULTS.md.
        figures: stored cells -> name -> panels.
        check: what ``--check`` runs again.
        pictures: (folder, desk) -> draws what needs a network there.
        notes: what a user who runs it here should know, a line each.
    """

    title: str
    about: str
    settings: Mapping[str, Any]
    steps: Sequence[Step]
    sections: Callable[[Stored], Sequence[Section]]
    figures: Callable[[Stored], Mapping[str, Sequence[Panel]]]
    check: Check | None = None
    pictures: Callable[[Path, Desk], None] | None = None
    added: Sequence[str] = ()
    notes: Sequence[str] = ()

"""Several ways to learn a task from few images, on the same frozen backbone and the same images."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

from spectralmoe.data.image_data import ImageData
from spectralmoe.diagnostics import holds_moe
from spectralmoe.errors import UserError, one_of
from spectralmoe.experiments.compare.settings import no_repeats
from spectralmoe.experiments.evidence import select
from spectralmoe.experiments.few_shot.learning import FEW_SHOT, draw_shots, few_shot
from spectralmoe.experiments.grid import DIVERGED, CellJob, finished_cells, run_cells
from spectralmoe.experiments.run_folder import run_folder
from spectralmoe.experiments.statistics import estimate
from spectralmoe.json_files import write_json
from spectralmoe.machine import describe_machine
from spectralmoe.naming import file_name
from spectralmoe.presets import PRESETS, find_preset
from spectralmoe.router import Router
from spectralmoe.rows import check_reads
from spectralmoe.scorers import LinearScorer
from spectralmoe.selectors import TopK
from spectralmoe.terms import Term
from spectralmoe.training.loop import Progress
from spectralmoe.training.names import FRESH_ROWS, OWN_ROWS
from spectralmoe.training.settings import Optimization, Positive, Seed, Settings, Several
from spectralmoe.vision import BranchSpec, add_branches
from spectralmoe.vision.branches import Branch
from spectralmoe.vision.model import VisionMoE, check_images

__all__ = ["FRESH_ROWS", "OWN_ROWS", "FewShotSettings", "FewShotTask", "Recipe", "recipe", "run_few_shot"]

FILE, CELLS = "fewshot.json", "cells"
GROWS = ("rows", "shots", "seeds")


class Cell(NamedTuple):
    """One network: trained on a few images, tested."""

    row: str
    shots: int
    seed: int

    @property
    def name(self) -> str:
        """A file name."""
        return f"{file_name(self.row)}-{self.shots}shots-seed{self.seed}"


class FewShotSettings(Settings):
    """What is compared.

    Attributes:
        rows: "linear-probe" (the head alone), "own" (the MoE parts that the model has), "adapter" (one dense adapter
            of the compute that a token meets in the others), or a router, see ``find_preset``.
        shots: images a class.
        k: experts a token in the routers' rows, or "soft".
        seeds: how many, counted from ``seed``; each draws images and first weights.
    """

    data: str
    rows: Several[str] = FRESH_ROWS
    shots: Several[Positive] = (1, 5, 10)
    seeds: Positive = 3
    seed: Seed = 0
    experts: Positive = 8
    bottleneck: Positive = 32
    k: Positive | Literal["soft"] = 1
    blocks: str = "last2"
    optimization: Optimization = FEW_SHOT

    def cells(self) -> list[Cell]:
        """All cells, seed by seed, so that a stopped run has about as many of each row."""
        seeds = range(self.seed, self.seed + self.seeds)
        return [Cell(row, shots, seed) for seed in seeds for shots in self.shots for row in self.rows]


class Recipe(NamedTuple):
    """What a row trains besides the head."""

    spec: BranchSpec | None
    terms: Mapping[str, Term]
    optimizer: Mapping[str, Any] | None = None
    own: bool = False


def recipe(row: str, settings: FewShotSettings) -> Recipe:
    """What is trained in ``row``.

    Raises:
        UserError: an unknown row.
    """
    if row in ("linear-probe", "own"):
        return Recipe(None, {}, own=row == "own")
    if row == "adapter":
        active = settings.experts if settings.k == "soft" else settings.k
        spec = BranchSpec(
            router=lambda dim, experts: Router(LinearScorer(dim, experts), TopK(1)),  # one expert: its weight is 1
            experts=1,
            bottleneck=active * settings.bottleneck,
            blocks=settings.blocks,
            tokens="all",
            norm=True,
        )
        return Recipe(spec, {})
    if row not in PRESETS and ":" not in row and not row.startswith("{"):
        raise one_of("row", row, [*OWN_ROWS, "adapter", *PRESETS, "pkg:object"])
    spec = BranchSpec.of(
        row,
        k=settings.k,
        experts=settings.experts,
        bottleneck=settings.bottleneck,
        blocks=settings.blocks,
        start="model",  # in every row
    )
    preset = find_preset(row)
    return Recipe(spec, preset.terms, preset.optimizer)


class FewShotTask(NamedTuple):
    """A frozen backbone and the images of a new task; ``source`` says which model it is, by the SHA-256 of its file."""

    model: VisionMoE
    source: str
    data: ImageData


def run_few_shot(settings: FewShotSettings, task: FewShotTask, out: Path, progress: Progress) -> list[dict[str, Any]]:
    """Run all cells (row, shots, seed) that ``out/cells`` does not hold yet; returns the summary of all that it holds.

    Another run there may ask for more rows, shots and seeds.

    Raises:
        UserError: as ``run_folder``; rows, by name, or data that do not fit the model; a damaged cell.
    """
    _check(settings, task)
    claim = {**settings.model_dump(mode="json"), "model": task.source, "images": task.data.fingerprint}
    with run_folder(out, claim, (FILE, CELLS), grows=GROWS) as claimed:
        grown = FewShotSettings.model_validate({**settings.model_dump(), **{key: claimed[key] for key in GROWS}})
        done = finished_cells(out / CELLS, (*Cell._fields, "cpu"))
        jobs = [
            CellJob(
                cell.name,
                cell._asdict(),
                f"{cell.row}, {cell.shots} shots, seed {cell.seed}",
                _run_cell,
                (cell, settings, task),
            )
            for cell in settings.cells()
            if cell.name not in done
        ]
        for name, result in run_cells(out / CELLS, jobs, 1, progress):
            done[name] = result
        progress("done", 1.0)
        cells = [done[cell.name] for cell in grown.cells() if cell.name in done]
        summary = _summary(grown, cells)
        machine, about = describe_machine(), grown.model_dump(mode="json")
        write_json(out / FILE, {"settings": about, "machine": machine, "summary": summary, "cells": cells})
        return summary


def _check(settings: FewShotSettings, task: FewShotTask) -> None:
    model, data = task.model, task.data
    for option, values in (("--rows", settings.rows), ("--shots", settings.shots)):
        no_repeats(option, values)
    for row in settings.rows:
        if (spec := recipe(row, settings).spec) is None:
            continue
        try:
            for module in add_branches(copy.deepcopy(model.backbone), spec).modules():
                if isinstance(module, Branch):
                    check_reads(module.moe, ())
        except UserError as error:
            raise UserError(f"row {row!r}: {error}") from error
    if "own" in settings.rows and not holds_moe(model):
        raise UserError("row 'own' trains the MoE parts of the model, but it has none; leave the row out")
    if data.channels != model.channels:
        raise UserError(f"{data.name!r} does not fit the model: it has {data.channels} channels, not {model.channels}")
    check_images(model, data.image_size)
    draw_shots(data.train, max(settings.shots), data.num_classes, settings.seed)  # enough of each class


def _run_cell(
    cell: Cell, settings: FewShotSettings, task: FewShotTask, progress: Callable[[float], None]
) -> dict[str, Any]:
    data, (spec, terms, optimizer, own) = task.data, recipe(cell.row, settings)
    train = draw_shots(data.train, cell.shots, data.num_classes, cell.seed)
    budget = settings.optimization.model_copy(update={"seed": cell.seed})
    started = time.monotonic()
    accuracy = few_shot(
        task.model,
        spec,
        train,
        data.test,
        data.num_classes,
        settings=budget,
        terms=terms,
        optimizer=optimizer,
        own=own,
        progress=progress,
    )
    return {"accuracy": accuracy, "seconds": round(time.monotonic() - started, 2)}


def _summary(settings: FewShotSettings, cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    summary = []
    for row in settings.rows:
        for shots in settings.shots:
            chosen = select(cells, row=row, shots=shots)
            value = estimate([cell.get("accuracy") for cell in chosen])
            diverged = [cell["seed"] for cell in chosen if DIVERGED in cell]
            accuracy = None if value is None else asdict(value)
            summary.append({"row": row, "shots": shots, "accuracy": accuracy, "diverged": diverged})
    return summary

"""Several ways to learn a task from few images, on the same frozen backbone and the same images."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from spectralmoe.data.image_data import ImageData
from spectralmoe.diagnostics import holds_moe
from spectralmoe.errors import UserError, one_of
from spectralmoe.experiments.compare.settings import no_repeats
from spectralmoe.experiments.few_shot.learning import FEW_SHOT, draw_shots, few_shot
from spectralmoe.experiments.run_folder import run_folder
from spectralmoe.experiments.statistics import estimate
from spectralmoe.files import read_json, write_json
from spectralmoe.machine import describe_machine
from spectralmoe.router import Router
from spectralmoe.scorers import LinearScorer
from spectralmoe.selectors import TopK
from spectralmoe.terms import Term
from spectralmoe.training.loop import Progress
from spectralmoe.training.names import FRESH_ROWS, OWN_ROWS
from spectralmoe.training.routers import ROUTERS
from spectralmoe.training.settings import Optimization, Positive, Seed, Settings, Several
from spectralmoe.training.vision import make_spec, router_terms
from spectralmoe.training.vision_settings import MoEParts
from spectralmoe.vision import BranchSpec, add_branches
from spectralmoe.vision.model import VisionMoE, check_images

__all__ = ["FRESH_ROWS", "OWN_ROWS", "FewShotSettings", "Recipe", "Task", "recipe", "run_few_shot"]

FILE = "fewshot.json"


class Cell(NamedTuple):
    """One network: trained on a few images, tested."""

    row: str
    shots: int
    seed: int


class FewShotSettings(Settings):
    """What is compared.

    Attributes:
        rows: "linear-probe" (the head alone), "own" (the MoE parts that the model has), "adapter" (one dense adapter
            of the compute that a token meets in the others), "emoe", "emoe-faithful", or a router preset.
        shots: images a class.
        seeds: how many, counted from ``seed``; each draws images and first weights.
    """

    data: str
    rows: Several[str] = FRESH_ROWS
    shots: Several[Positive] = (1, 5, 10)
    seeds: Positive = 3
    seed: Seed = 0
    experts: Positive = 8
    bottleneck: Positive = 32
    mode: Literal["soft", "top1", "top2"] = "top1"
    blocks: str = "last2"
    optimization: Optimization = FEW_SHOT

    def cells(self) -> list[Cell]:
        """All cells; the rows take turns, so that a stopped run holds every row alike."""
        seeds = range(self.seed, self.seed + self.seeds)
        return [Cell(row, shots, seed) for seed in seeds for shots in self.shots for row in self.rows]


class Recipe(NamedTuple):
    """What a row trains besides the head."""

    spec: BranchSpec | None
    terms: Mapping[str, Term]
    own: bool = False


def recipe(row: str, settings: FewShotSettings) -> Recipe:
    """What is trained in ``row``.

    Raises:
        UserError: an unknown row.
    """
    if row in ("linear-probe", "own"):
        return Recipe(None, {}, own=row == "own")
    if row not in ("adapter", "emoe", "emoe-faithful", *ROUTERS) and ":" not in row:
        raise one_of("row", row, [*OWN_ROWS, "adapter", "emoe", "emoe-faithful", *ROUTERS, "pkg:Class"])
    if row == "adapter":
        active = {"soft": settings.experts, "top1": 1, "top2": 2}[settings.mode]
        spec = BranchSpec(
            router=lambda dim, experts: Router(LinearScorer(dim, experts), TopK()),  # one expert: its weight is 1
            experts=1,
            bottleneck=active * settings.bottleneck,
            blocks=settings.blocks,
            tokens="all",
            norm=True,
        )
        return Recipe(spec, {})
    router = "emoe" if row == "emoe-faithful" else row
    wanted = MoEParts(
        router=router,
        faithful=row == "emoe-faithful",
        experts=settings.experts,
        bottleneck=settings.bottleneck,
        mode=settings.mode,
        blocks=settings.blocks,
        start="model",  # in every row
    )
    return Recipe(make_spec(wanted), router_terms(router))


class Task(NamedTuple):
    """A frozen backbone and the images of a new task; ``source`` says which model it is, by the SHA-256 of its file."""

    model: VisionMoE
    source: str
    data: ImageData


def run_few_shot(settings: FewShotSettings, task: Task, out: Path, progress: Progress) -> list[dict[str, Any]]:
    """Run all cells (row, shots, seed) that ``out/fewshot.json`` does not hold yet; returns the summary.

    Raises:
        UserError: as ``run_folder``; rows or data that do not fit the model; a damaged file.
    """
    _check(settings, task)
    claim = {**settings.model_dump(mode="json"), "model": task.source, "images": task.data.fingerprint}
    with run_folder(out, claim, (FILE,)):
        cells = _finished(out / FILE)
        done = {Cell(cell["row"], cell["shots"], cell["seed"]) for cell in cells}
        wanted = settings.cells()
        for index, cell in enumerate(wanted):
            if cell not in done:
                text = f"{cell.row}, {cell.shots} shots, seed {cell.seed}"
                cells.append(_run_cell(cell, settings, task, partial(_tell, progress, text, index, len(wanted))))
                _write(out, settings, cells)
        progress("done", 1.0)
    return _summary(settings, cells)


def _check(settings: FewShotSettings, task: Task) -> None:
    model, data = task.model, task.data
    for option, values in (("--rows", settings.rows), ("--shots", settings.shots)):
        no_repeats(option, values)
    for row in settings.rows:
        if (spec := recipe(row, settings).spec) is not None:
            add_branches(copy.deepcopy(model.backbone), spec)
    if "own" in settings.rows and not holds_moe(model):
        raise UserError("row 'own' trains the MoE parts of the model, but it has none; leave the row out")
    if data.channels != model.channels:
        raise UserError(f"{data.name!r} does not fit the model: it has {data.channels} channels, not {model.channels}")
    check_images(model, data.image_size)
    draw_shots(data.train, max(settings.shots), data.num_classes, settings.seed)  # enough of each class


def _run_cell(cell: Cell, settings: FewShotSettings, task: Task, progress: Callable[[float], None]) -> dict[str, Any]:
    data, (spec, terms, own) = task.data, recipe(cell.row, settings)
    train = draw_shots(data.train, cell.shots, data.num_classes, cell.seed)
    budget = settings.optimization.model_copy(update={"seed": cell.seed})
    started = time.monotonic()
    accuracy = few_shot(
        task.model, spec, train, data.test, data.num_classes, settings=budget, terms=terms, own=own, progress=progress
    )
    return {**cell._asdict(), "accuracy": accuracy, "seconds": round(time.monotonic() - started, 2)}


def _tell(progress: Progress, text: str, index: int, cells: int, share: float) -> None:
    progress(text, (index + 0.9 * share) / cells)


def _finished(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        keys = (*Cell._fields, "accuracy", "seconds")
        return [{key: cell[key] for key in keys} for cell in read_json(path)["cells"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not the file of a few-shot run; move it away or choose another --out") from error


def _summary(settings: FewShotSettings, cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row in settings.rows:
        for shots in settings.shots:
            values = [cell["accuracy"] for cell in cells if cell["row"] == row and cell["shots"] == shots]
            value = estimate(values)
            found.append({"row": row, "shots": shots, "accuracy": None if value is None else asdict(value)})
    return found


def _write(out: Path, settings: FewShotSettings, cells: Sequence[Mapping[str, Any]]) -> None:
    results = {
        "settings": settings.model_dump(mode="json"),
        "machine": describe_machine(),
        "summary": _summary(settings, cells),
        "cells": cells,
    }
    write_json(out / FILE, results)

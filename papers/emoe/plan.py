"""What the card runs: parts (a) from scratch, (c) one change at a time, (b) few images, (d) what the experts hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from few import FEW_ROWS, run_few, tune_few
from holdings import draw_holdings
from measure import run_cell, step_times, tune_row
from rows import BASELINES, FEW_BASELINES, ROWS
from sizes import GROWING, Sizes
from variants import VARIANTS, run_variant

from spectralmoe.draw.panels import Lines, Panel, Point
from spectralmoe.experiments.cards import Card, Cells, Check, Section, Step, Tuning
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.experiments.evidence import select
from spectralmoe.experiments.statistics import estimate

FULL_SIZES = Sizes(
    dataset="fashion-mnist",
    epochs=2,
    train_size=None,
    seeds=5,
    tune_size=20_000,
    tune_epochs=2,
    ablation_size=20_000,
    ablation_epochs=2,
    ablation_seeds=1,
    backbone_epochs=3,
    tasks=("new classes", "mnist5k"),
    shots=(1, 5, 10),
    draws=5,
    shot_epochs=60,
)

QUICK_SIZES = Sizes(
    dataset="mnist5k",
    epochs=2,
    train_size=1_000,
    seeds=1,
    tune_size=500,
    tune_epochs=1,
    ablation_size=500,
    ablation_epochs=1,
    ablation_seeds=1,
    backbone_epochs=2,
    tasks=("new classes",),
    shots=(1, 5),
    draws=1,
    shot_epochs=5,
)


def steps(sizes: Sizes) -> list[Step]:
    """Times of a step, the rows taking turns in one process; then part by part tuning and cells."""
    scratch = [{"row": row, "seed": seed} for seed in range(sizes.seeds) for row in ROWS]
    changes = [{"variant": name, "seed": seed} for seed in range(sizes.ablation_seeds) for name in VARIANTS]
    shots = [
        {"row": row, "task": task, "shots": count, "seed": seed}
        for seed in range(sizes.draws)
        for task in sizes.tasks
        for count in sizes.shots
        for row in FEW_ROWS
    ]
    return [
        Tuning("times", tuple(ROWS)[:1], partial(step_times, sizes=sizes)),
        Tuning("tuning", tuple(ROWS), partial(tune_row, sizes=sizes)),
        Cells("results", scratch, partial(run_cell, sizes=sizes)),
        Cells("ablations", changes, partial(run_variant, sizes=sizes)),
        Tuning("fewshot_tuning", tuple(FEW_ROWS), partial(tune_few, sizes=sizes)),
        Cells("fewshot", shots, partial(run_few, sizes=sizes)),
    ]


def card(sizes: Sizes, checked: Sequence[str] = ()) -> Card:
    """One form of the card.

    Args:
        checked: rows that ``--check`` runs again under all seeds.
    """
    settings = {key: value for key, value in asdict(sizes).items() if key not in GROWING}
    again = [{"row": row, "seed": seed} for row in checked for seed in range(sizes.seeds)]
    keys = ("accuracy", "maxvio", "min_load_share", "output_cos2", "changed_by_noise")
    check = Check(Cells("results", again, partial(run_cell, sizes=sizes)), ("row",), keys) if checked else None
    pictures = partial(draw_holdings, sizes=sizes)
    return Card("EMoE", ABOUT, settings, steps(sizes), sections, figures, check, pictures)


ABOUT = """
Written by `spectralmoe card papers/emoe`: mean and 95% interval over seeds. Dead experts: of both layers together.
Entropy: of a token's gate, 1 is uniform. Smallest share: of 8 experts, 0.125 is even. Differences are paired: the same
seed, so the same start and the same order of images, on the same processor; "separated" where their 95% interval leaves
out 0. Single cells are not stable across processors, means over seeds are.
"""

COLUMNS = (
    Column("accuracy", "accuracy %", 2, "test accuracy"),
    Column("maxvio", "MaxVio", 2, "largest load over mean load minus 1"),
    Column("gini", "Gini", 2, "Gini coefficient of the load"),
    Column("dead", "dead", 1, "experts with less than a tenth of an even load"),
    Column("min_load_share", "smallest load share", 3, "smallest load of any expert"),
    Column("output_cos2", "output cos²", 4, "likeness of two experts' outputs"),
    Column("entropy", "entropy", 2, "of a token's gate"),
    Column("changed_by_noise", "changed by noise", 3, "share of tokens whose expert changes"),
)
TIME = Column("step_ms", "step, ms", 1, "a training step")
COMPARED = ("accuracy", "maxvio", "min_load_share", "output_cos2", "changed_by_noise")
DIFFERENCES = tuple(
    Column(column.key, "accuracy" if column.key == "accuracy" else column.title, column.digits, column.meaning)
    for column in COLUMNS
    if column.key in COMPARED
)


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """Part (a), part (c), and part (b) with a column for each number of images."""
    results, changes = stored["results"], stored["ablations"]
    made = [
        Section("## From scratch", results, (*COLUMNS, TIME), pairs=BASELINES, differences=DIFFERENCES),
        Section("## One change at a time (validation data)", changes, COLUMNS, {"variant": "variant"}),
    ]
    for task in dict.fromkeys(cell["task"] for cell in stored["fewshot"]):
        cells = select(stored["fewshot"], task=task)
        columns = [Column(f"{n} shots", f"{n} shots", 2, "") for n in sorted({cell["shots"] for cell in cells})]
        made.append(Section(f"## Few-shot: {task}", _by_shots(cells), columns, pairs=FEW_BASELINES))
    return made


def _by_shots(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One cell for each row, seed and processor: its accuracies after so many images a class."""
    joined: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cell in cells:
        about = {key: cell[key] for key in ("row", "seed", "cpu")}
        joined.setdefault(tuple(about.values()), about)[f"{cell['shots']} shots"] = cell.get("accuracy")
    return list(joined.values())


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """Accuracy against images a class, task by task."""
    panels: list[Panel] = []
    for task in dict.fromkeys(cell["task"] for cell in stored["fewshot"]):
        cells, series = select(stored["fewshot"], task=task), dict[str, list[Point]]()
        for row in dict.fromkeys(cell["row"] for cell in cells):
            for n in sorted({cell["shots"] for cell in cells}):
                value = estimate([cell.get("accuracy") for cell in select(cells, row=row, shots=n)])
                if value is not None:
                    series.setdefault(row, []).append(Point(n, value.mean, value.half))
        panels.append(Lines(f"{task}: accuracy %", series, "images a class", "higher", log_x=True))
    return {"fewshot": panels}


FULL = card(FULL_SIZES, checked=("EMoE",))
QUICK = card(QUICK_SIZES)

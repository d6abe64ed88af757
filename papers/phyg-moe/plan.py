"""What the card runs: a light and a heavy expert behind gates by spectrum, by content, by chance, and by the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from measure import above_chance, by_gate, measure
from rows import CHANCE, CONTENT, ROWS, SPECTRUM, TOLD

from spectralmoe.draw.panels import Lines, Panel, Point
from spectralmoe.experiments.cards import Card, Section
from spectralmoe.experiments.cards.plan import Cells
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.experiments.evidence import select
from spectralmoe.experiments.statistics import estimate
from spectralmoe.training.settings.run import TrainSettings


def run_of(train_size: int, epochs: int, hidden: int = 32) -> TrainSettings:
    """A network of one block with a light and a heavy expert, one a record."""
    return TrainSettings(
        data="signals:interference",
        train_size=train_size,
        depth=1,
        network={"width": 16, "num_experts": 2, "hidden": hidden, "k": 1},
        optimization={"epochs": epochs, "batch_size": 64, "lr": 6e-3},
    )


def card(run: TrainSettings, seeds: int) -> Card:
    """One form of the card."""
    wanted = [{"row": row, "seed": seed} for seed in range(seeds) for row in ROWS]
    steps = [Cells("results", wanted, partial(measure, run=run))]
    return Card("PhyG-MoE", ABOUT, {"run": run.model_dump(mode="json")}, steps, sections, figures)


ABOUT = """
Written by `spectralmoe card papers/phyg-moe`: mean and 95% interval over seeds; the test part chose nothing. Heavy:
share of records that the heavy expert gets, of one jammer and of two. Above chance: accuracy less that of a gate by
chance that calls the heavy expert as often, on a straight line between the shares that were run, under the same seed.
Differences are paired: the same seed, so the same start and the same order of records, on the same processor;
"separated" where their 95% interval leaves out 0. Single cells are not stable across processors, means over seeds are.
"""

ACCURACY = Column("accuracy", "accuracy %", 2, "of the test part", better="higher")
ABOVE = Column("above_chance", "above chance", 2, "accuracy less that of chance of the same share", better="higher")
COST = Column("expert_mflop", "MFLOP", 2, "of the chosen experts, mean over records", better="lower")
COLUMNS = (
    ACCURACY,
    Column("accuracy_single", "one jammer %", 2, "accuracy on records of one jammer", better="higher"),
    Column("accuracy_pair", "two jammers %", 2, "accuracy on records of two", better="higher"),
    COST,
    Column("heavy_single", "heavy, one %", 1, "records of one jammer that the heavy expert gets", 100.0),
    Column("heavy_pair", "heavy, two %", 1, "records of two jammers that the heavy expert gets", 100.0),
    ABOVE,
)
GATE_COLUMNS = (ABOVE, ACCURACY, COST, COLUMNS[4], COLUMNS[5])
GATES = {"spectrum": list(SPECTRUM), "content": list(CONTENT), TOLD: [TOLD]}
PAIRS = [
    *zip(SPECTRUM, CONTENT, strict=True),
    ("chance 100%", "chance 0%"),
    (TOLD, "chance 100%"),
    (TOLD, "chance 75%"),
]


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """Every row, and every gate over its prices."""
    cells = above_chance(stored["results"])
    means, compared = by_gate(cells, GATES), [("spectrum", "content"), (TOLD, "spectrum")]
    return [
        Section("## Rows", cells, COLUMNS, pairs=PAIRS, differences=(ACCURACY, COST, ABOVE)),
        Section("## Gates: means over prices", means, GATE_COLUMNS, pairs=compared),
    ]


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """Accuracy against the operations of the experts: a curve for each gate."""
    cells, series = stored["results"], dict[str, list[Point]]()
    for name, rows in {"chance": list(CHANCE), **GATES}.items():
        points = [place(cells, row) for row in rows]
        series[name] = sorted((point for point in points if point is not None), key=lambda point: point.x)
    drawn = {name: points for name, points in series.items() if points}
    return {"curves": [Lines(ACCURACY.title, drawn, "MFLOP a record in the experts", "higher")]} if drawn else {}


def place(cells: Sequence[Mapping[str, Any]], row: str) -> Point | None:
    """A row in the plane of cost and accuracy."""
    there = select(cells, row=row)
    cost, value = (estimate([cell.get(column.key) for cell in there]) for column in (COST, ACCURACY))
    return None if cost is None or value is None else Point(cost.mean, value.mean, value.half)


FULL = card(run_of(2_100, 8), seeds=5)
QUICK = card(run_of(42, 1, hidden=16), seeds=1)

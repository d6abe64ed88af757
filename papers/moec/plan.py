"""What the card runs: five rows with few and with many experts, on few images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from measure import by_size, measure, with_gap
from rows import PAIRS, ROWS

from spectralmoe.draw.panels import Lines, Panel, Point
from spectralmoe.experiments.cards import Card, Contest, Section
from spectralmoe.experiments.cards.plan import Identity
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.experiments.evidence import select
from spectralmoe.experiments.statistics import estimate
from spectralmoe.training.settings.run import TrainSettings

EXPERTS = (8, 32, 64)
TUNED_AT = 32


def run_of(train_size: int, epochs: int) -> TrainSettings:
    """A network of two stages, one of E experts an image."""
    return TrainSettings(
        data="fashion-mnist",
        train_size=train_size,
        depth=2,
        network={"width": 64, "num_experts": TUNED_AT, "hidden": 32, "k": 1},
        optimization={"epochs": epochs, "batch_size": 64, "lr": 3e-3},
    )


def sized(run: TrainSettings, cell: Identity) -> TrainSettings:
    """The run of a cell, with its number of experts."""
    return run.model_copy(update={"network": run.network.model_copy(update={"num_experts": cell["experts"]})})


def card(run: TrainSettings, experts: Sequence[int], seeds: int, tries: int) -> Card:
    """One form of the card."""
    contest = Contest(run, ROWS, tries=tries, more=measure, vary=sized)
    steps = [contest.tuning(), contest.cells(seeds, experts=experts)]
    return Card("MoEC", ABOUT, contest.settings, steps, sections, figures)


ABOUT = """
Written by `spectralmoe card papers/moec`: mean and 95% interval over seeds; the test part chose nothing. Gap: accuracy
on the training images less that on the test part. Siblings, others: mean cosine of two experts' scores over test
images, of a group and of two groups, mean over layers. MaxVio: largest load over mean load minus 1. Differences are
paired: the same seed, so the same start and the same order of images, on the same processor; "separated" where their
95% interval leaves out 0. Single cells are not stable across processors, means over seeds are.
"""

ACCURACY = Column("accuracy", "accuracy %", 2, "of the test part", better="higher")
GAP = Column("gap", "gap", 2, "accuracy on the training images less that on the test part", better="lower")
COLUMNS = (
    ACCURACY,
    Column("train_accuracy", "training %", 2, "accuracy on the training images"),
    GAP,
    Column("nll", "nll", 3, "negative log-likelihood of the test part", better="lower"),
    Column("siblings", "siblings", 3, "likeness of the scores of experts of a group"),
    Column("others", "others", 3, "likeness of the scores of experts of two groups"),
    Column("max_vio", "MaxVio", 2, "largest load over mean load minus 1", better="lower"),
    Column("dead_experts", "dead", 1, "experts with less than a tenth of an even load, both layers", better="lower"),
)
DIFFERENCES = (COLUMNS[0], COLUMNS[2], COLUMNS[3], COLUMNS[4], COLUMNS[5], COLUMNS[6])
GROWTH = (
    Column("growth", "accuracy, most less fewest experts", 2, "of the test part", better="higher"),
    Column("best", "log2 of the best number", 1, "of experts, by accuracy on the test part"),
)


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """Every row with every number of experts, and what more experts bring."""
    cells, rows = with_gap(stored["results"]), {"experts": "experts", "row": "row"}
    few = f"## From {min(c['experts'] for c in cells)} to {max(c['experts'] for c in cells)} experts"
    return [
        Section("## Rows", cells, COLUMNS, rows, pairs=PAIRS, within="experts", differences=DIFFERENCES),
        Section(few, by_size(cells), GROWTH, pairs=PAIRS),
    ]


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """Accuracy and gap against the number of experts."""
    cells, panels = with_gap(stored["results"]), list[Panel]()
    for column in (ACCURACY, GAP):
        series: dict[str, list[Point]] = {}
        for row in ROWS:
            for experts in EXPERTS:
                value = estimate([cell.get(column.key) for cell in select(cells, row=row, experts=experts)])
                if value is not None:
                    series.setdefault(row, []).append(Point(experts, value.mean, value.half))
        panels.append(Lines(column.title, series, "experts", column.better, log_x=True))
    return {"experts": panels}


FULL = card(run_of(2_000, 10), EXPERTS, seeds=5, tries=4)
QUICK = card(run_of(128, 1), (8, 32), seeds=1, tries=1)

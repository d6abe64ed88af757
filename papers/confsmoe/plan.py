"""What the card runs: six gates, each with six ways to stand in for a missing view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from measure import measure
from rows import GATE_PAIRS, GATES, PLACEHOLDER_PAIRS, PLACEHOLDERS, ROWS

from spectralmoe.draw.panels import Lines, Panel, Point
from spectralmoe.experiments.cards import Card, Contest, Section
from spectralmoe.experiments.cards.plan import Identity
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.experiments.evidence import select
from spectralmoe.experiments.statistics import estimate
from spectralmoe.training.settings.run import TrainSettings

RATES = (0.0, 0.3, 0.5, 0.7)
TUNED_WITH = "stages 1 + 2"


def run_of(train_size: int | None, epochs: int) -> TrainSettings:
    """A network of two blocks, one of 16 experts a view, at the learning rate at which experts die soonest."""
    return TrainSettings(
        data="views:digits",
        train_size=train_size,
        depth=2,
        network={"width": 64, "num_experts": 16, "hidden": 32, "k": 1},
        views={"missing": 0.5, "rates": RATES, **PLACEHOLDERS[TUNED_WITH]},
        optimization={"epochs": epochs, "batch_size": 128, "lr": 1e-2},
    )


def filled(run: TrainSettings, cell: Identity) -> TrainSettings:
    """The run of a cell, with what stands in the place of a missing view."""
    views = run.views.model_copy(update=PLACEHOLDERS[cell["missing"]])  # type: ignore[union-attr]
    return run.model_copy(update={"views": views})


def card(run: TrainSettings, placeholders: Sequence[str], seeds: int, tries: int) -> Card:
    """One form of the card."""
    contest = Contest(run, ROWS, tries=tries, more=measure, vary=filled)
    steps = [contest.tuning(), contest.cells(seeds, missing=placeholders)]
    return Card("ConfSMoE", ABOUT, contest.settings, steps, sections, figures)


ABOUT = """
Written by `spectralmoe card papers/confsmoe`: mean and 95% interval over seeds; the test part chose nothing. In
training half of the views are missing; accuracy is that of the test part with 0, 30, 50 and 70% of them missing, and
its mean. Usage: entropy of the load over log E, in the layer where it is smallest. Correlation: of an expert's
confidence with whether the head on its output alone is right; over: mean confidence less the share that is; alone: that
share. Differences are paired: the same seed, so the same start, the same order of samples and the same missing views,
on the same processor; "separated" where their 95% interval leaves out 0. Single cells are not stable across processors,
means over seeds are.
"""

ACCURACY = Column("accuracy", "accuracy %", 2, "mean over missing rates", better="higher")
AT_RATES = tuple(
    Column(f"accuracy_missing_{100 * rate:g}", f"{100 * rate:g}% missing", 2, "accuracy there", better="higher")
    for rate in RATES
)
USAGE = Column("usage", "usage", 2, "entropy of the load over log E, smallest of the layers", better="higher")
COLUMNS = (
    ACCURACY,
    *AT_RATES,
    Column("ece", "ECE %", 2, "expected calibration error, mean over missing rates", better="lower"),
    USAGE,
    Column("dead_experts", "dead", 1, "experts with less than a tenth of an even load, both layers", better="lower"),
    Column("correlation", "correlation", 2, "of confidence and being right", better="higher"),
    Column("over", "over", 2, "mean confidence less the share that is right"),
    Column("alone", "alone %", 1, "of experts' outputs alone that the head reads right", 100.0),
)
DIFFERENCES = (ACCURACY, *AT_RATES, COLUMNS[5], USAGE)


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """Every gate with every placeholder: gates compared under each placeholder, placeholders under each gate."""
    cells = stored["results"]
    turned = [{**cell, "row": cell["missing"], "gate": cell["row"]} for cell in cells]
    by_gate, by_placeholder = {"missing": "missing view", "row": "gate"}, {"gate": "gate", "row": "missing view"}
    return [
        Section("## Gates", cells, COLUMNS, by_gate, pairs=GATE_PAIRS, within="missing", differences=DIFFERENCES),
        Section(
            "## Missing views",
            turned,
            (ACCURACY, *AT_RATES),
            by_placeholder,
            pairs=PLACEHOLDER_PAIRS,
            within="gate",
            differences=(ACCURACY, *AT_RATES),
        ),
    ]


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """Accuracy against the missing rate: of the gates with both stages, of the placeholders under the method."""
    cells = stored["results"]
    gates = {gate: _curve(select(cells, row=gate, missing=TUNED_WITH)) for gate in GATES}
    kinds = {kind: _curve(select(cells, row="confidence", missing=kind)) for kind in PLACEHOLDERS}
    return {
        "missing": [
            Lines(title, {name: curve for name, curve in series.items() if curve}, "% of views missing", "higher")
            for title, series in ((f"accuracy %, {TUNED_WITH}", gates), ("accuracy %, confidence", kinds))
        ]
    }


def _curve(cells: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Accuracy at every rate."""
    values = {
        rate: estimate([cell.get(column.key) for cell in cells]) for rate, column in zip(RATES, AT_RATES, strict=True)
    }
    return [Point(100 * rate, value.mean, value.half) for rate, value in values.items() if value is not None]


FULL = card(run_of(None, 8), tuple(PLACEHOLDERS), seeds=5, tries=3)
QUICK = card(run_of(128, 1), ("zeros", "stages 1 + 2"), seeds=1, tries=1)

"""What the card runs: students with both directions learned, and with one of them frozen at random, in three widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from dynamics import ARMS, Budget, trial

from spectralmoe.draw.panels import Lines, Panel, Point
from spectralmoe.experiments.cards import Card, Cells, Desk, Section, Step, Tuning, try_settings
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.experiments.evidence import select
from spectralmoe.experiments.statistics import estimate
from spectralmoe.training.tasks.base import Metric

RATES = (0.1, 0.3, 1.0)
LOSS = Metric("loss", "error", "over the teacher's variance", "lower", digits=4)


def tune(row: str, desk: Desk, progress: Any, *, dim: int, budget: Budget) -> dict[str, Any]:
    """The step size of a row by the error of a student that is not reported."""

    def train_with(setting: Mapping[str, Any]) -> tuple[float, None]:
        loss = trial(row, dim, 0, setting["lr"], budget, part=1)["loss"]
        assert loss is not None
        return loss, None

    tried = try_settings([{"lr": lr} for lr in RATES], train_with, progress, LOSS)
    return {row: {**tried.setting, "tries": tried.tries}}


def measure(cell: Mapping[str, Any], desk: Desk, progress: Any, *, budget: Budget) -> dict[str, float | None]:
    """One student."""
    return trial(cell["row"], cell["dim"], cell["seed"], desk.tuned["tuning"][cell["row"]]["lr"], budget)


def card(budget: Budget, dims: Sequence[int], seeds: int) -> Card:
    """One form of the card."""
    wanted = [{"row": row, "dim": dim, "seed": seed} for seed in range(seeds) for dim in dims for row in ARMS]
    steps: list[Step] = [
        Tuning("tuning", tuple(ARMS), partial(tune, dim=dims[0], budget=budget)),
        Cells("results", wanted, partial(measure, budget=budget)),
    ]
    return Card("Soft-routed units", ABOUT, {"budget": asdict(budget)}, steps, sections, figures)


ABOUT = """
Written by `spectralmoe card papers/soft-routed`: mean and 95% interval over seeds. Steps: until some unit has a cosine
of 0.9 with each of the teacher's directions; empty where a seed did not get there, and then its row has fewer seeds.
Lag: steps from the last expert to the last router. Errors are over the variance of the teacher's outputs: of the
student, of the units that pruning left, of these after more steps, and of as many new units after those steps.
Differences are paired by seed: the same teacher, start and samples.
"""
COLUMNS = (
    Column("steps_experts", "steps, experts", 0, "until the teacher's experts are found", better="lower"),
    Column("steps_routers", "steps, routers", 0, "until its routers are found", better="lower"),
    Column("lag", "lag", 0, "from the last expert to the last router"),
    Column("experts", "cosine of experts", 2, "of the best unit, mean over the teacher's", better="higher"),
    Column("routers", "cosine of routers", 2, "of the best unit, mean over the teacher's", better="higher"),
    Column("loss", "error", 4, "over the teacher's variance", better="lower"),
    Column("units", "units kept", 1, "by pruning"),
    Column("pruned", "pruned", 4, "error", better="lower"),
    Column("tuned", "tuned", 4, "error of the pruned units after more steps", better="lower"),
    Column("fresh", "new units", 4, "error of as many new units after those steps", better="lower"),
)
PAIRS = [("router frozen", "joint"), ("expert frozen", "joint"), ("pruned, tuned", "new units")]
DIFFERENCES = (COLUMNS[0], COLUMNS[3], COLUMNS[4], COLUMNS[5])


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """For each width the rows; the pruned and the new units of the joint student stand as rows of their own."""
    cells = stored["results"]
    ends = [
        {**{key: cell[key] for key in ("dim", "seed", "cpu")}, "row": row, "loss": cell[key]}
        for cell in select(cells, row="joint")
        for row, key in (("pruned, tuned", "tuned"), ("new units", "fresh"))
    ]
    return [
        Section(
            f"## D = {dim}",
            [*select(cells, dim=dim), *select(ends, dim=dim)],
            COLUMNS,
            pairs=PAIRS,
            differences=DIFFERENCES,
        )
        for dim in dict.fromkeys(cell["dim"] for cell in cells)
    ]


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """Steps until experts and routers are found, and the error, against D."""
    joint = select(stored["results"], row="joint")
    steps = {"experts": _line(joint, "steps_experts"), "routers": _line(joint, "steps_routers")}
    errors = {row: _line(select(stored["results"], row=row), "loss") for row in ARMS}
    return {
        "dynamics": [
            Lines("steps until found, joint", steps, "D", better="lower", log_x=True),
            Lines("error", errors, "D", better="lower", log_x=True),
        ]
    }


def _line(cells: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """The mean at each D, with its interval."""
    points = []
    for dim in sorted({cell["dim"] for cell in cells}):
        found = estimate([cell[key] for cell in select(cells, dim=dim) if cell[key] is not None])
        points += [] if found is None else [Point(dim, found.mean, found.half)]
    return points


FULL = card(Budget(), dims=(16, 32, 64), seeds=5)
QUICK = card(Budget(batch=64, steps=40, tuned_steps=10, tested=500), dims=(16, 32), seeds=1)

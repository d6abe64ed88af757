"""Least-loaded expert parallelism: the load and the modelled cost of plans on trained and drawn loads."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from loads import DEVICES, LOADS, Load, Sizes, steps_of
from random_spill import plan_random_spill

from spectralmoe.draw.panels import Panel
from spectralmoe.experiments.cards import Card, Cells, Check, Desk, Section, difference_panels
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.experiments.evidence import select
from spectralmoe.parallel import Cost, Plan, plan_least_loaded, plan_native, plan_replicas

FULL_SIZES = Sizes(windows=5_600, steps=16, batch=32, tokens=32_768, seeds=5)
QUICK_SIZES = Sizes(windows=64, steps=2, batch=8, tokens=8_192, seeds=1)

COST = Cost(dim=2880, hidden=2880, matrices=3)
"""An expert of gpt-oss-20b, which has 32 of them, on the data sheet of an H200."""

Planner = Callable[[Load, Load, int], Plan]

PLANS: dict[str, Planner] = {
    "expert parallel": lambda seen, load, seed: plan_native(load, DEVICES),
    "least loaded": lambda seen, load, seed: plan_least_loaded(load, DEVICES),
    "least loaded, 1.1": lambda seen, load, seed: plan_least_loaded(load, DEVICES, capacity=1.1),
    "least loaded, 1.3": lambda seen, load, seed: plan_least_loaded(load, DEVICES, capacity=1.3),
    "replicas, seen": lambda seen, load, seed: plan_replicas(load, DEVICES, seen=seen),
    "replicas, known": lambda seen, load, seed: plan_replicas(load, DEVICES),
    "random spill": lambda seen, load, seed: plan_random_spill(load, DEVICES, seed=seed),
}
"""Row -> (the load seen before, the load of the step, a seed) -> plan."""


def measure(cell: Mapping[str, Any], desk: Desk, progress: Any, *, sizes: Sizes) -> dict[str, float]:
    """Means over steps and layers: the busiest device, what travels, and what the cost model makes of it."""
    steps = steps_of(cell["load"], cell["seed"], desk, sizes)
    plans = [PLANS[cell["row"]](seen, load, number) for number, (seen, load) in enumerate(steps)]
    return {
        "imbalance": statistics.fmean(plan.imbalance() for plan in plans),
        "worst": max(plan.imbalance() for plan in plans),
        "copies": statistics.fmean(len(plan.copies) for plan in plans),
        "milliseconds": statistics.fmean(1e3 * plan.modelled_time(COST) for plan in plans),
        "gigabytes": statistics.fmean(1e-9 * plan.modelled_bytes(COST) for plan in plans),
    }


COLUMNS = (
    Column("imbalance", "busiest", 2, "tokens of the busiest device over the mean", better="lower"),
    Column("worst", "worst step", 2, "the same of the worst step", better="lower"),
    Column("copies", "copies", 1, "experts whose weights travel in a step"),
    Column("milliseconds", "time, ms", 2, "modelled time of the last device", better="lower"),
    Column("gigabytes", "memory, GB", 2, "modelled memory of the fullest device", better="lower"),
)
PAIRS = [
    *((row, "expert parallel") for row in PLANS if row != "expert parallel"),
    ("least loaded", "random spill"),
    ("least loaded", "replicas, seen"),
    ("least loaded", "replicas, known"),
]

ABOUT = """
Written by `spectralmoe card papers/llep`: mean and 95% interval over seeds; each value is a mean over steps and layers.
32 experts on 8 devices. Time and memory are modelled for experts of gpt-oss-20b on the data sheet of an H200, without
the exchange of tokens, which all plans need; nothing is timed. Differences are paired by seed: the same loads;
"separated" where their 95% interval leaves out 0.
"""


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """A table for each kind of load."""
    cells = stored["results"]
    return [Section(f"## Load: {load}", select(cells, load=load), COLUMNS, pairs=PAIRS) for load in LOADS]


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """On the trained model's loads, every plan less expert parallelism."""
    cells = select(stored["results"], load="trained")
    drawn = [column for column in COLUMNS if column.key in ("imbalance", "milliseconds", "gigabytes")]
    return {"trained": list(difference_panels(cells, drawn, "expert parallel"))}


def check(sizes: Sizes) -> Check:
    """What ``--check`` runs again: the first two rows on the loads of models trained anew."""
    again = [{"row": row, "load": "trained", "seed": seed} for seed in range(sizes.seeds) for row in list(PLANS)[:2]]
    return Check(Cells("results", again, partial(measure, sizes=sizes)), ("row", "load"), ("imbalance", "copies"))


def card(sizes: Sizes) -> Card:
    """One form of the card."""
    wanted = [
        {"row": row, "load": load, "seed": seed} for seed in range(sizes.seeds) for load in LOADS for row in PLANS
    ]
    settings = {key: value for key, value in asdict(sizes).items() if key != "seeds"} | {"cost": asdict(COST)}
    cells = Cells("results", wanted, partial(measure, sizes=sizes))
    return Card("Least-loaded expert parallelism", ABOUT, settings, [cells], sections, figures, check(sizes))


FULL = card(FULL_SIZES)
QUICK = card(QUICK_SIZES)

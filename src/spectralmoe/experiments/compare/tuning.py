"""Tuning on validation data: every row tries the same number of settings; the test part is never touched."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from spectralmoe.experiments.compare.settings import Cell
from spectralmoe.experiments.compare.setup import Setup, Tuned
from spectralmoe.training.loop import train
from spectralmoe.training.tasks import Metric

__all__ = ["TRY_KEYS", "best_setting", "candidates", "try_candidate"]

TRY_KEYS = ("router", "depth", "candidate", "lr", "strength")
"""What tells a try from the others; its measure is the metric of the task on the validation part."""


def candidates(count: int) -> list[Tuned]:
    """The settings that each row tries: the preset, then the same log-uniform draws for every row.

    >>> candidates(2)[0], len(candidates(5))
    (Tuned(lr=1.0, strength=1.0), 5)
    """
    draw = random.Random(0)
    drawn = [Tuned(10 ** draw.uniform(-0.5, 0.5), 10 ** draw.uniform(-1, 1)) for _ in range(count - 1)]
    return [Tuned(), *drawn][:count]


def try_candidate(cell: Cell, candidate: Tuned, setup: Setup, progress: Callable[[float], None]) -> dict[str, Any]:
    """The metric of the task on the validation part that the row of ``cell`` reaches with ``candidate``."""
    network, run, terms, optimizer = setup.recipe(cell, candidate)
    history = train(network, setup.task, run.optimization, terms=terms, optimizer=optimizer, progress=progress)
    return {history.metric.key_of("validation"): history.validation}


def best_setting(cell: Cell, tries: Iterable[Mapping[str, Any]], metric: Metric) -> Tuned:
    """The candidate that is best on the validation part in this cell's row; the preset where nothing was tuned."""
    key = metric.key_of("validation")
    row = [
        one for one in tries if (one["router"], one["depth"]) == (cell.router, cell.depth) and one.get(key) is not None
    ]
    best = max(row, key=lambda one: metric.rank(one[key]), default=None)
    return Tuned() if best is None else Tuned(best["lr"], best["strength"])

"""Tuning on validation data: every row tries the same number of settings; the test part is never touched."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import NamedTuple

from spectralmoe.compare.settings import Cell
from spectralmoe.compare.setup import Setup, Tuned
from spectralmoe.errors import UserError
from spectralmoe.files import read_json, write_json
from spectralmoe.training.loop import Diverged, Watcher, train

__all__ = ["best_setting", "candidates", "tune_row"]

TRIED = "tuning.json"


class Try(NamedTuple):
    """One candidate on one row, and what it reached on the validation part (percent)."""

    router: str
    depth: int
    candidate: int
    lr: float
    strength: float
    validation_accuracy: float | None  # None: it diverged


def candidates(count: int) -> list[Tuned]:
    """The settings that each row tries: the preset, then the same log-uniform draws for every row.

    >>> candidates(2)[0], len(candidates(5))
    (Tuned(lr=1.0, strength=1.0), 5)
    """
    draw = random.Random(0)
    drawn = [Tuned(10 ** draw.uniform(-0.5, 0.5), 10 ** draw.uniform(-1, 1)) for _ in range(count - 1)]
    return [Tuned(), *drawn][:count]


def tune_row(cell: Cell, setup: Setup, watch: Watcher) -> None:
    """Try every candidate on the row of ``cell`` and append each result to ``tuning.json`` at once."""
    tried = _read(setup.out / TRIED)
    done = {(one.router, one.depth, one.candidate) for one in tried}
    for index, candidate in enumerate(candidates(setup.settings.tune)):
        if (cell.router, cell.depth, index) in done:
            continue
        network, budget, terms = setup.recipe(cell, candidate)
        text = f"tuning {cell.router}, depth {cell.depth}, {index + 1}/{setup.settings.tune}"
        try:
            history = train(network, setup.data, budget, terms=terms, progress=partial(watch, text))
            accuracy = history.validation_accuracy
        except Diverged:
            accuracy = None
        tried.append(Try(cell.router, cell.depth, index, *candidate, accuracy))
        write_json(setup.out / TRIED, [one._asdict() for one in tried])


def best_setting(cell: Cell, setup: Setup) -> Tuned:
    """The candidate with the best validation accuracy in this cell's row; the preset where nothing was tuned."""
    row = [one for one in _read(setup.out / TRIED) if (one.router, one.depth) == (cell.router, cell.depth)]
    best = max(row, key=lambda one: -1 if one.validation_accuracy is None else one.validation_accuracy, default=None)
    return Tuned() if best is None else Tuned(best.lr, best.strength)


def _read(path: Path) -> list[Try]:
    if not path.exists():
        return []
    try:
        return [Try(**row) for row in read_json(path)]
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to tune again") from error

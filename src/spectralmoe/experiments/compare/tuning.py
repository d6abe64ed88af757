"""Tuning on validation data: every row tries the same number of settings; the test part is never touched."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from spectralmoe.errors import UserError
from spectralmoe.experiments.compare.settings import Cell
from spectralmoe.experiments.compare.setup import Setup, Tuned
from spectralmoe.files import read_json, write_json
from spectralmoe.training.loop import Diverged, train

__all__ = ["TRIED", "Try", "best_setting", "candidates", "note", "try_candidate", "untried"]

TRIED = "tuning.json"


class Try(NamedTuple):
    """One candidate on one row, and what the task's metric is for it on the validation part."""

    router: str
    depth: int
    candidate: int
    lr: float
    strength: float
    validation: float | None  # None: it diverged


def candidates(count: int) -> list[Tuned]:
    """The settings that each row tries: the preset, then the same log-uniform draws for every row.

    >>> candidates(2)[0], len(candidates(5))
    (Tuned(lr=1.0, strength=1.0), 5)
    """
    draw = random.Random(0)
    drawn = [Tuned(10 ** draw.uniform(-0.5, 0.5), 10 ** draw.uniform(-1, 1)) for _ in range(count - 1)]
    return [Tuned(), *drawn][:count]


def untried(cells: Sequence[Cell], setup: Setup) -> list[tuple[Cell, int]]:
    """The rows (any cell of theirs) and candidates that ``tuning.json`` does not hold yet.

    Raises:
        UserError: the file is damaged.
    """
    done = {(one.router, one.depth, one.candidate) for one in _read(setup.out / TRIED)}
    wanted = [(cell, index) for cell in cells for index in range(setup.settings.tune)]
    return [(cell, index) for cell, index in wanted if (cell.router, cell.depth, index) not in done]


def try_candidate(cell: Cell, index: int, setup: Setup, progress: Callable[[float], None]) -> Try:
    """Train candidate ``index`` on the row of ``cell``."""
    candidate = candidates(setup.settings.tune)[index]
    network, run, terms = setup.recipe(cell, candidate)
    try:
        history = train(network, setup.task, run.optimization, terms=terms, progress=progress)
    except Diverged:
        return Try(cell.router, cell.depth, index, *candidate, None)
    return Try(cell.router, cell.depth, index, *candidate, history.validation)


def note(tried: Try, setup: Setup) -> None:
    """Add one result to ``tuning.json``."""
    known = sorted([*_read(setup.out / TRIED), tried], key=lambda one: one[:3])
    write_json(setup.out / TRIED, [one._asdict() for one in known])


def best_setting(cell: Cell, setup: Setup) -> Tuned:
    """The candidate that is best on the validation part in this cell's row; the preset where nothing was tuned."""
    row = [one for one in _read(setup.out / TRIED) if (one.router, one.depth) == (cell.router, cell.depth)]
    whole = [one for one in row if one.validation is not None]
    best = max(whole or row, key=lambda one: setup.task.metric.rank(one.validation or 0.0), default=None)
    return Tuned() if best is None else Tuned(best.lr, best.strength)


def _read(path: Path) -> list[Try]:
    if not path.exists():
        return []
    try:
        return [Try(**row) for row in read_json(path)]
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to tune again") from error

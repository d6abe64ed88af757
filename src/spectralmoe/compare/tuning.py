"""Tuning on validation data: every row tries the same number of settings; the test part is never touched."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from spectralmoe.compare.settings import Cell
from spectralmoe.compare.setup import Setup
from spectralmoe.files import read_json, write_json
from spectralmoe.training.loop import train
from spectralmoe.training.network import build_network
from spectralmoe.training.routers import find_preset

__all__ = ["Tuned", "best_setting", "candidates", "tune_row"]


class Tuned(NamedTuple):
    """What tuning may change: the learning rate, and the weight of a row's own terms; factors on the presets."""

    lr: float = 1.0
    strength: float = 1.0


def candidates(count: int) -> list[Tuned]:
    """The settings that each row tries: the preset, then the same log-uniform draws for every row.

    >>> candidates(2)[0], len(candidates(5))
    (Tuned(lr=1.0, strength=1.0), 5)
    """
    draw = random.Random(0)
    drawn = [Tuned(10 ** draw.uniform(-0.5, 0.5), 10 ** draw.uniform(-1, 1)) for _ in range(count - 1)]
    return [Tuned(), *drawn][:count]


def tune_row(cell: Cell, setup: Setup, watch: Callable[[str, float], None]) -> None:
    """Try every candidate on the row of ``cell`` and append each result to ``tuning.json`` at once."""
    tried = _read(setup)
    for index, candidate in enumerate(candidates(setup.settings.tune)):
        if any((row["router"], row["depth"], row["candidate"]) == (cell.router, cell.depth, index) for row in tried):
            continue
        budget = setup.settings.optimization
        budget = budget.model_copy(update={"seed": cell.seed, "lr": budget.lr * candidate.lr})
        network = build_network(setup.data, setup.settings.network, cell.router, cell.depth, cell.seed)
        terms = find_preset(cell.router).strengthened(candidate.strength).terms
        text = f"tuning {cell.router}, depth {cell.depth}, {index + 1}/{setup.settings.tune}"
        history = train(network.to(setup.device), setup.data, budget, terms=terms, progress=partial(watch, text))
        tried.append({**cell._asdict(), "candidate": index, **candidate._asdict()})
        tried[-1]["validation_accuracy"] = history.validation_accuracy
        write_json(setup.out / "tuning.json", tried)


def best_setting(cell: Cell, setup: Setup) -> Tuned:
    """The candidate with the best validation accuracy in this cell's row; the preset where nothing was tuned."""
    rows = [row for row in _read(setup) if (row["router"], row["depth"]) == (cell.router, cell.depth)]
    best = max(rows, key=lambda row: row["validation_accuracy"], default=None)
    return Tuned() if best is None else Tuned(best["lr"], best["strength"])


def _read(setup: Setup) -> list[dict[str, Any]]:
    path = setup.out / "tuning.json"
    return list(read_json(path)) if path.exists() else []

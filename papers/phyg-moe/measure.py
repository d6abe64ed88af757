"""What a cell is: a network of one gate, its accuracy, and how often it calls the heavy expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from rows import CHANCE, ROWS, SHARES, TOLD
from torch import Tensor, nn

from spectralmoe.experiments.cards import Desk, Trained
from spectralmoe.experiments.cards.contest import train_row
from spectralmoe.experiments.compare.setup import Tuned
from spectralmoe.feeding import feed
from spectralmoe.layers import moe_layers
from spectralmoe.training.loop import train
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.tasks.signals import Signals, SignalTask

__all__ = ["ToldTask", "above_chance", "by_gate", "measure"]

Progress = Callable[[float], None]


class ToldTask(SignalTask):
    """The same task, whose networks send one jammer to the light expert and two to the heavy one."""

    def logits(self, model: nn.Module, batch: Signals) -> Tensor:
        chosen = self.jammers.to(batch.labels.device)[batch.labels, None] - 1
        with feed(model, indices=dict.fromkeys(moe_layers(model), chosen)):
            return super().logits(model, batch)

    @property
    def jammers(self) -> Tensor:
        """How many jammers each class has (21,)."""
        return self.parts["test"].components[: len(self.parts["test"].labels.unique())]


def measure(cell: Mapping[str, Any], desk: Desk, progress: Progress, *, run: TrainSettings) -> dict[str, Any]:
    """One cell: the metrics of the task, and the share of records that the heavy expert gets."""
    torch.set_num_threads(1)
    row, seed = cell["row"], cell["seed"]
    trained = told(run, seed, progress) if row == TOLD else train_row(run, ROWS[row], Tuned(), seed, progress)
    scores, history = trained.task.score(trained.network, "test"), trained.history
    layer = moe_layers(trained.network)["blocks.0.moe"]
    costs = layer.experts.costs((layer.router.scorer.dim, 1, 1))
    light = 100 * float(costs[0] / costs[1])
    heavy = {f"heavy_{name}": (scores[f"cost_{name}"] - light) / (100 - light) for name in ("single", "pair")}
    share = (6 * heavy["heavy_single"] + 15 * heavy["heavy_pair"]) / 21
    return {**scores, history.metric.key_of("validation"): history.validation, **heavy, "heavy": share}


def told(run: TrainSettings, seed: int, progress: Progress) -> Trained:
    """The network of the gate that is told how many jammers there are."""
    optimization = run.optimization.model_copy(update={"seed": seed})
    run = run.model_copy(update={"optimization": optimization, "router": ROWS[TOLD]})
    task = told_task(run.train_size)
    network = task.build(run)
    return Trained(network, task, train(network, task, run.optimization, progress=progress))


@cache
def told_task(train_size: int | None) -> ToldTask:
    """The task, made once a process."""
    return ToldTask(train_size)


def above_chance(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The cells, with accuracy less that of chance which calls the heavy expert as often, under the same seed.

    Between the shares that were run, the accuracy of chance is a straight line; without all of them there is none.
    """
    curves: dict[int, dict[str, float]] = {}
    for cell in cells:
        if cell["row"] in CHANCE and "accuracy" in cell:
            curves.setdefault(cell["seed"], {})[cell["row"]] = cell["accuracy"]
    found = []
    for cell in cells:
        curve = curves.get(cell["seed"], {})
        if "accuracy" in cell and len(curve) == len(CHANCE):
            same = float(np.interp(cell["heavy"], SHARES, [curve[row] for row in CHANCE]))
            cell = {**cell, "above_chance": cell["accuracy"] - same}
        found.append(dict(cell))
    return found


def by_gate(cells: Sequence[Mapping[str, Any]], gates: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """A cell for each gate and seed: the mean over its prices; none where one of them is missing.

    Args:
        gates: what a gate is called -> its rows.
    """
    found = []
    for seed in dict.fromkeys(cell["seed"] for cell in cells):
        for gate, rows in gates.items():
            here = [cell for cell in cells if cell["seed"] == seed and cell["row"] in rows and "above_chance" in cell]
            if len(here) == len(rows):
                keys = ("above_chance", "accuracy", "expert_mflop", "heavy_single", "heavy_pair")
                means = {key: sum(cell[key] for cell in here) / len(here) for key in keys}
                found.append({"row": gate, "seed": seed, "cpu": here[0].get("cpu"), **means})
    return found

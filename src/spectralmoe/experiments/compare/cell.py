"""One cell of a comparison: train a network, measure it, adapt it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from spectralmoe.adaptation import Trial, one_shot_trials
from spectralmoe.diagnostics import dead_experts, gini, max_vio, min_share
from spectralmoe.diagnostics.evaluation import Counted
from spectralmoe.diagnostics.measure import mean_of
from spectralmoe.experiments.compare.look import active_flops, active_parameters, choices
from spectralmoe.experiments.compare.settings import Cell
from spectralmoe.experiments.compare.setup import Setup, Tuned
from spectralmoe.layers import moe_layers
from spectralmoe.linalg import sigma_max, stable_rank
from spectralmoe.saving import save
from spectralmoe.training.loop import History, train
from spectralmoe.training.network import CHECKPOINT
from spectralmoe.training.tasks import Task

__all__ = ["run_cell"]


def run_cell(cell: Cell, tuned: Tuned, setup: Setup, progress: Callable[[float], None]) -> dict[str, Any]:
    """Train, measure and adapt one network; its model goes to ``models/CELL``, its row comes back as JSON values."""
    task, folder = setup.task, setup.out / "models" / cell.name
    network, run, terms, optimizer = setup.recipe(cell, tuned)
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / CHECKPOINT
    history = train(
        network, task, run.optimization, terms=terms, optimizer=optimizer, checkpoint=place, progress=progress
    )
    counted = Counted(network)
    scores = task.score(counted, "test")
    save(network, folder, meta=task.meta(run, scores, counted.loads))
    row = {**cell._asdict(), "tuned": tuned._asdict(), **scores, **_measures(network, task, counted.loads, history)}
    if (labelled := task.labelled("test")) is None:
        return row | choices(network, task.inputs("test"), task.beside("test"))
    return row | _adaptation(one_shot_trials(network, *labelled, trials=setup.settings.trials, seed=cell.seed))


def _measures(network: nn.Module, task: Task, loads: Mapping[str, Tensor], history: History) -> dict[str, Any]:
    shares = list(loads.values())
    matrices = [
        m.detach()
        for layer in moe_layers(network).values()
        if layer.router and (m := layer.router.scorer.matrix) is not None
    ]
    return {
        history.metric.key_of("validation"): history.validation,
        "max_vio": max(map(max_vio, shares)),
        "gini": max(map(gini, shares)),
        "dead_experts": sum(map(dead_experts, shares)),
        "min_load_share": min(map(min_share, shares)),
        "sigma_1": mean_of([float(sigma_max(m)) for m in matrices]),
        "stable_rank": mean_of([float(stable_rank(m)) for m in matrices]),
        "parameters": sum(p.numel() for p in network.parameters()),
        "active_parameters": active_parameters(network, task.example(), loads),
        "active_flops": active_flops(network, task.example(), loads),
        "seconds_per_epoch": history.seconds_per_epoch,
        "per_second": task.size * task.units / history.seconds_per_epoch,
        "epochs": history.epochs,
        "loads": {name: load.tolist() for name, load in loads.items()},
    }


def _adaptation(trials: Sequence[Trial]) -> dict[str, Any]:
    return {
        "interference": mean_of([trial.interference for trial in trials]),
        "interference_worst": min((trial.interference for trial in trials), default=None),
        "success": mean_of([float(trial.success) for trial in trials]),
        "trials": len(trials),
        "trial_list": [asdict(trial) for trial in trials],
    }

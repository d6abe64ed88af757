"""Contest: networks of a card that differ by their row alone, under one budget, with equal tuning and measures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn

from spectralmoe.diagnostics import dead_experts, gini, holds_moe, max_vio, min_share
from spectralmoe.diagnostics.evaluation import Counted
from spectralmoe.experiments.cards.plan import Cells, Desk, Identity, Share, Tuning
from spectralmoe.experiments.cards.tries import try_settings
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.experiments.compare.look import choices
from spectralmoe.experiments.compare.setup import Tuned
from spectralmoe.experiments.compare.tuning import candidates
from spectralmoe.presets import find_preset
from spectralmoe.training.loop import History, train
from spectralmoe.training.settings import Row
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.tasks import Task, open_task

__all__ = ["ROUTING_COLUMNS", "Contest", "Trained", "measure_cell", "train_row", "tune_row"]


class Trained(NamedTuple):
    """A trained network, its task, and how its training went."""

    network: nn.Module
    task: Task
    history: History


def _nothing_more(trained: Trained) -> dict[str, Any]:
    return {}


def _as_it_is(run: TrainSettings, cell: Identity) -> TrainSettings:
    return run


@dataclass(frozen=True, slots=True)
class Contest:
    """The settings that all networks of a card share; its functions can be imported, so other processes find them.

    Attributes:
        run: data, sizes and budget; router and seed are those of the cell.
        rows: row -> what ``find_preset`` reads; classes of the card's own folder are "module:Class".
        tries: settings that each row tries on the validation part, factors on its learning rate and on the weights of
            its terms; the first leaves both as they are.
        tune_size, tune_epochs: training samples and epochs of a try; None: those of ``run``.
        looked: how many test samples show the choices of the routers; None: so many that they hold about 4,000 numbers.
            For images of 28 x 28 these are 5, with 80 patches of 7 x 7, so a share of 1/2 is known to 11 points. See
            ``choices``.
        more: further measures of a trained network.
        vary: (run, cell) -> the run of a cell that names more than its row and seed.
        file: its cells go to FILE.json; a card with several contests gives each a file of its own.

    >>> run = TrainSettings(data="digits", depth=1)
    >>> contest = Contest(run, {"linear": "linear", "top2": {"preset": "linear", "k": 2}})
    >>> contest.tuning().rows, len(contest.cells(seeds=3).wanted)
    (['linear', 'top2'], 6)
    """

    run: TrainSettings
    rows: Mapping[str, Row]
    tries: int = 4
    tune_size: int | None = None
    tune_epochs: int | None = None
    looked: int | None = None
    more: Callable[[Trained], Mapping[str, Any]] = _nothing_more
    vary: Callable[[TrainSettings, Identity], TrainSettings] = _as_it_is
    file: str = "results"

    @property
    def tuned(self) -> str:
        """Where the settings of its rows are kept: tuning.json, or FILE-tuning.json beside a file of its own."""
        return "tuning" if self.file == "results" else f"{self.file}-tuning"

    def tuning(self) -> Tuning:
        """The step that tunes every row under seed 0."""
        return Tuning(self.tuned, list(self.rows), partial(tune_row, contest=self))

    def cells(self, seeds: int, **axes: Sequence[Any]) -> Cells:
        """The step that measures every row under every seed, at every value of the axes that ``vary`` reads."""
        places = list(product(*axes.values()))
        wanted = [
            {"row": row, **dict(zip(axes, place, strict=True)), "seed": seed}
            for seed in range(seeds)
            for place in places
            for row in self.rows
        ]
        return Cells(self.file, wanted, partial(measure_cell, contest=self))

    @property
    def shorter(self) -> TrainSettings:
        """The shorter run for a tuning try."""
        run, epochs = self.run, self.tune_epochs or self.run.optimization.epochs
        optimization = run.optimization.model_copy(update={"epochs": epochs})
        size = self.tune_size or run.train_size
        return run.model_copy(update={"train_size": size, "optimization": optimization})

    @property
    def settings(self) -> dict[str, Any]:
        """The settings whose change would invalidate stored cells."""
        return {
            "run": self.run.model_dump(mode="json"),
            **{key: getattr(self, key) for key in ("tries", "tune_size", "tune_epochs")},
            **({} if self.looked is None else {"looked": self.looked}),
        }


def tune_row(row: str, desk: Desk, progress: Share, *, contest: Contest) -> dict[str, Any]:
    """The factors of a row that the validation part prefers, and all that were tried."""
    torch.set_num_threads(1)
    shorter = contest.shorter

    def validation(setting: Mapping[str, Any]) -> tuple[float, None]:
        return train_row(shorter, contest.rows[row], Tuned(**setting), 0).history.validation, None

    settings = [tuned._asdict() for tuned in candidates(contest.tries)]
    tried = try_settings(settings, validation, progress, _open(shorter).metric)
    return {row: {"setting": dict(tried.setting), "tries": tried.tries}}


def measure_cell(cell: Identity, desk: Desk, progress: Share, *, contest: Contest) -> dict[str, Any]:
    """One cell: a network trained with the tuned factors of its row, and its measures."""
    torch.set_num_threads(1)
    row, run = cell["row"], contest.vary(contest.run, cell)
    tuned = Tuned(**desk.tuned[contest.tuned][row]["setting"])
    trained = train_row(run, contest.rows[row], tuned, cell["seed"], progress)
    return {**measures(trained, contest.looked), **contest.more(trained)}


def train_row(
    run: TrainSettings, row: Row, tuned: Tuned, seed: int, progress: Callable[[float], None] | None = None
) -> Trained:
    """Train the network of a row on the budget of ``run``; under one seed rows start alike but for their routers."""
    optimization = run.optimization.model_copy(update={"seed": seed, "lr": run.optimization.lr * tuned.lr})
    values: dict[str, Any] = {"optimization": optimization}
    values |= {"router": row} if run.moe is None else {"moe": run.moe.model_copy(update={"router": row})}
    run = run.model_copy(update=values)
    task = _open(run)
    network = task.build(run)
    preset = find_preset(row).strengthened(tuned.strength)
    history = train(network, task, run.optimization, terms=preset.terms, optimizer=preset.optimizer, progress=progress)
    return Trained(network, task, history)


def measures(trained: Trained, looked: int | None = None) -> dict[str, Any]:
    """Scores on the test part; with experts also their load, their similarity, and the stability of choices."""
    network, task, history = trained
    counted = Counted(network) if holds_moe(network) else None
    values: dict[str, Any] = {
        **task.score(counted or network, "test"),
        task.metric.key_of("validation"): history.validation,
    }
    if counted is None or len(next(iter(counted.loads.values()))) == 1:
        return values  # nothing is chosen
    loads = list(counted.loads.values())
    values |= {"max_vio": statistics.fmean(map(max_vio, loads)), "gini": statistics.fmean(map(gini, loads))}
    values |= {"dead_experts": sum(map(dead_experts, loads)), "min_load_share": min(map(min_share, loads))}
    return values | choices(network, task.inputs("test"), task.beside("test"), samples=looked)


ROUTING_COLUMNS = (
    Column("max_vio", "MaxVio", 2, "largest load over mean load minus 1, mean over layers", better="lower"),
    Column("gini", "Gini", 2, "Gini coefficient of the load, mean over layers", better="lower"),
    Column("dead_experts", "dead", 1, "experts with less than a tenth of an even load, all layers", better="lower"),
    Column("entropy", "entropy", 2, "entropy of a token's scores over log E"),
    Column("output_overlap", "output cos²", 3, "squared cosine of two experts' outputs for one token", better="lower"),
    Column("output_centred", "centred cos²", 3, "the same less each expert's mean output", better="lower"),
    Column("noise_flips", "flips %", 1, "tokens whose choice changes under noise of 5%", 100.0, better="lower"),
)
"""What ``measure_cell`` says of routers; the metrics of the task stand beside them."""


def _open(run: TrainSettings) -> Task:
    """The task of a run, read once a process."""
    whole = ("data", "image_size", "train_size", "hold_out", "text", "restore", "views", "backbone")
    read: dict[str, Any] = {**dict.fromkeys(whole, True), "optimization": {"label_smoothing", "mixup"}}
    return _opened(run.model_dump_json(include=read))


@cache
def _opened(settings: str) -> Task:
    return open_task(TrainSettings.model_validate_json(settings))

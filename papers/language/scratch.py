"""Part (a): a small language model from scratch, trained on three domains and measured by domain."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from rows import Setting, preset_of, tries
from torch import Tensor

from spectralmoe import record
from spectralmoe.data.text_data import load_text
from spectralmoe.diagnostics import dead_experts, max_vio, min_share
from spectralmoe.diagnostics.association import association, label_table
from spectralmoe.diagnostics.evaluation import Counted, evaluation_mode
from spectralmoe.diagnostics.measure import mean_of
from spectralmoe.experiments.cards import Desk, try_settings
from spectralmoe.experiments.compare.look import active_flops, active_parameters, choices
from spectralmoe.models import LanguageMoE
from spectralmoe.training.loop import train
from spectralmoe.training.settings import Network, Optimization
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.settings.text import Text
from spectralmoe.training.tasks.text import TextTask

Progress = Callable[[float], None]
NETWORK = Network(width=128, num_experts=8, hidden=128, k=2)
DEPTH = 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of one form of the card; ``seeds`` changes no cell that is there.

    Attributes:
        data: text by name, a domain a source.
        vocab, length: tokens of the vocabulary, and of a window.
        windows: training windows, in equal numbers from each domain.
        tune_windows: the same where settings are chosen.
        batch: windows a step.
        measured: windows of each domain that the test part is measured on.
    """

    data: str
    vocab: int
    length: int
    windows: int
    tune_windows: int
    batch: int
    measured: int
    seeds: int


@cache
def open_task(sizes: Sizes, windows: int) -> TextTask:
    """The text of a form with so many training windows."""
    text = Text(length=sizes.length, vocab=sizes.vocab, measured=sizes.measured)
    return TextTask(load_text(sizes.data.removeprefix("text:")), text, train_size=windows)


def build(row: str, task: TextTask, seed: int) -> LanguageMoE:
    """The untrained model; rows under one seed start alike but for their gates."""
    settings = TrainSettings(
        data=task.name, router=row, depth=DEPTH, network=NETWORK, optimization=Optimization(seed=seed), text=task.text
    )
    return task.build(settings)


def fit(row: str, setting: Setting, task: TextTask, batch: int, seed: int) -> tuple[LanguageMoE, float]:
    """The trained model, after one look at every window, and its bits per byte on validation text."""
    model = build(row, task, seed)
    budget = Optimization(epochs=1, batch_size=batch, lr=setting.lr, weight_decay=0.01, seed=seed)
    history = train(model, task, budget, terms=preset_of(row, setting.strength).terms)
    return model, history.validation


def tune_row(row: str, desk: Desk, progress: Progress, *, sizes: Sizes) -> dict[str, Any]:
    """The setting of a row with the fewest bits per byte on validation text, of as many tries as every other row."""
    torch.set_num_threads(1)
    task = open_task(sizes, sizes.tune_windows)

    def fitted(setting: Mapping[str, Any]) -> tuple[float, None]:
        return fit(row, Setting(**setting), task, sizes.batch, 0)[1], None

    tried = try_settings([setting._asdict() for setting in tries(row)], fitted, progress, task.metric)
    return {row: {"setting": list(tried.setting.values()), "tries": tried.tries}}


def run_cell(cell: Any, desk: Desk, progress: Progress, *, sizes: Sizes) -> dict[str, Any]:
    """One cell of results.json."""
    torch.set_num_threads(1)
    task, row = open_task(sizes, sizes.windows), cell["row"]
    model, validation = fit(row, Setting(*desk.tuned["tuning"][row]["setting"]), task, sizes.batch, cell["seed"])
    counted = Counted(model)
    values: dict[str, Any] = {**task.score(counted, "test"), task.metric.key_of("validation"): validation}
    values |= {"active_parameters": active_parameters(model, task.example())}
    values |= {"active_flops": active_flops(model, task.example())}
    loads = list(counted.loads.values())
    if len(loads[0]) == 1:
        return values  # one expert: nothing is chosen
    values |= {
        "max_vio": statistics.fmean(map(max_vio, loads)),
        "min_load_share": min(map(min_share, loads)),
        "dead_experts": sum(map(dead_experts, loads)),
        "domain_information": domain_information(model, task),
    }
    return values | choices(model, task.inputs("test"))


@torch.no_grad()
def domain_information(model: LanguageMoE, task: TextTask, most: int = 96) -> float | None:
    """How much the expert of a token tells of its domain, 0 to 1: normalised mutual information, mean over layers."""
    windows, domains = task.parts["test"], len(task.data.domains)
    windows = windows[torch.linspace(0, len(windows) - 1, min(most, len(windows))).long()]
    tables: dict[str, Tensor] = {}
    with evaluation_mode(model):
        for start in range(0, len(windows), 16):
            batch = windows.part(slice(start, start + 16), torch.device("cpu"))
            with record(model) as tape:
                model(batch.tokens[:, :-1])
            for item in tape:
                table = label_table(item.routing, batch.domains.flatten(), domains)
                tables[item.name] = tables[item.name] + table if item.name in tables else table
    return mean_of([value for table in tables.values() if (value := association(table).value) is not None])

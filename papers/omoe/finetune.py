"""What a cell is: a dense network learns five classes, its MLPs become equal experts, and they learn all ten."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from spectralmoe import LinearScorer, Router, TopK
from spectralmoe.data.image_data import ImageData, Split, load_data
from spectralmoe.diagnostics import evaluate
from spectralmoe.experiments.cards import Desk, small_images, try_settings
from spectralmoe.experiments.cards.contest import Trained, measures
from spectralmoe.layers import moe_layers
from spectralmoe.moe import MoE
from spectralmoe.training.loop import train
from spectralmoe.training.settings import Optimization
from spectralmoe.training.tasks import ImageTask
from spectralmoe.vision import BranchSpec, replace_mlp

__all__ = ["ROWS", "Sizes", "experts_of", "run_cell", "start", "tune_row"]

OLD = 5
"""The classes 0 to 4 are those of the start."""

ROWS: dict[str, dict[str, Any] | None] = {
    "adamw": None,
    "omoe": {"type": "orthogonal_experts"},
    "omoe-random": {"type": "variants:turned"},
    "omoe-update": {"type": "orthogonal_experts", "on": "update"},
    "omoe-update-random": {"type": "variants:turned", "on": "update"},
    "omoe-short": {"type": "orthogonal_experts", "on": "update", "match_norm": False},
    "adamw-short": {"type": "variants:shorter", "on": "update"},
}
"""Row -> what goes around AdamW, as a row of a comparison says it; the length of a phase is that of ``Sizes``."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of one form of the card.

    Attributes:
        images: training images of ten classes; the start learns from the half of them that shows the first five.
        phase: steps of a phase.
        rates: factors on the learning rate that every row tries.
    """

    images: int
    epochs: int
    phase: int
    seeds: int
    rates: tuple[float, ...] = (1.0, 0.5, 2.0)
    data: str = "fashion-mnist"
    experts: int = 8
    hidden: int = 128
    batch_size: int = 64
    lr: float = 2e-3

    def budget(self, seed: int, factor: float = 1.0) -> Optimization:
        """Of the start and of the finetuning."""
        return Optimization(epochs=self.epochs, batch_size=self.batch_size, lr=factor * self.lr, seed=seed)


def tune_row(row: str, desk: Desk, progress: Callable[[float], None], *, sizes: Sizes) -> dict[str, Any]:
    """The learning rate of a row that the validation part prefers under seed 0, and all that were tried."""
    torch.set_num_threads(1)

    def validation(setting: Mapping[str, Any]) -> tuple[float, None]:
        return finetuned(row, desk, 0, setting["lr"], sizes).history.validation, None

    tried = try_settings([{"lr": rate} for rate in sizes.rates], validation, progress)
    return {row: {"setting": dict(tried.setting), "tries": tried.tries}}


def run_cell(cell: Mapping[str, Any], desk: Desk, progress: Callable[[float], None], *, sizes: Sizes) -> dict[str, Any]:
    """Finetune with a row's optimizer; what is measured on the test part and of the experts."""
    torch.set_num_threads(1)
    row, seed = cell["row"], cell["seed"]
    rate = 1.0 if cell["rate"] == "equal" else desk.tuned["tuning"][row]["setting"]["lr"]
    trained = finetuned(row, desk, seed, rate, sizes, progress)
    old = half(_data(sizes).test)
    ups, before = experts_of(trained.network), experts_of(start(desk, seed, sizes))
    return {
        **measures(trained),
        "old_accuracy": evaluate(trained.network, old.images, old.labels).accuracy,
        "moved": _mean([float((up - was).norm() / was.norm()) for up, was in zip(ups, before, strict=True)]),
        "apart": _mean([float((up - up.mean(0)).norm() / up.norm()) for up in ups]),
    }


def finetuned(
    row: str,
    desk: Desk,
    seed: int,
    rate: float,
    sizes: Sizes,
    progress: Callable[[float], None] | None = None,
) -> Trained:
    """All ten classes, from the start of the seed, with the optimizer of a row."""
    network, task = copy.deepcopy(start(desk, seed, sizes)), ImageTask(_data(sizes))
    around = ROWS[row]
    optimizer = None if around is None else {**around, "phase": sizes.phase}
    history = train(network, task, sizes.budget(seed, rate), optimizer=optimizer, progress=progress)
    return Trained(network, task, history)


def start(desk: Desk, seed: int, sizes: Sizes) -> nn.Module:
    """A ViT that learned the first five classes, each of its MLPs made into equal experts, with a fresh head."""

    def learn() -> tuple[nn.Module, Any]:
        data = _data(sizes)
        task = ImageTask(replace(data, train=half(data.train), validation=half(data.validation)))
        run = small_images().model_copy(update={"moe": None, "optimization": sizes.budget(seed)})
        network = task.build(run)
        return network, train(network, task, run.optimization).epochs

    network, _ = desk.network(f"start-{seed}", learn)
    torch.manual_seed(seed)
    network.new_head(10)
    replace_mlp(network.backbone, BranchSpec(router=gate, experts=sizes.experts, blocks="all"), init="copy")
    return network.requires_grad_(True)


def gate(dim: int, num_experts: int) -> Router:
    """A linear gate whose weights sum to 1, so that equal experts compute what their original did."""
    return Router(LinearScorer(dim, num_experts), TopK(2, normalize=True))


def experts_of(network: nn.Module) -> list[Tensor]:
    """The first matrices (E, H, D) of each layer's experts."""
    return [layer.experts.first_weight.detach() for layer in moe_layers(network).values() if isinstance(layer, MoE)]


def half(split: Split) -> Split:
    """The images of the first five classes."""
    chosen = split.labels < OLD
    return Split(split.images[chosen], split.labels[chosen])


@cache
def _read(name: str, images: int) -> ImageData:
    data = load_data(name).subset(images)
    return replace(data, validation=_first(data.validation, 2_000), test=_first(data.test, 5_000))


def _first(split: Split, count: int) -> Split:
    return Split(split.images[:count], split.labels[:count])


def _data(sizes: Sizes) -> ImageData:
    return _read(sizes.data, sizes.images)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

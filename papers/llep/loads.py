"""The loads that are planned for: of a language model trained without a balance term, and drawn ones."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from spectralmoe import record
from spectralmoe.diagnostics.evaluation import evaluation_mode
from spectralmoe.experiments.cards import Desk, small_text, train_row
from spectralmoe.experiments.compare.setup import Tuned
from spectralmoe.parallel import scaled_load
from spectralmoe.training.settings.text import Text

EXPERTS, DEVICES, SLOTS_A_TOKEN = 32, 8, 2
SKEWS = {"even": 0.0, "30% to one": 0.3, "80% to one": 0.8, "95% to one": 0.95, "95% to another each step": 0.95}
LOADS = ("trained", *SKEWS)

Load = list[int]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of one form of the card; ``seeds`` changes no cell that is there.

    Attributes:
        windows: training windows of the language model.
        steps: steps that are planned, a layer; batches of test text, or draws.
        batch: test windows a step, one after another in the text.
        tokens: tokens on each device that the load of a step is scaled to.
    """

    windows: int
    steps: int
    batch: int
    tokens: int
    seeds: int

    @property
    def slots(self) -> int:
        """Slots of a step on all devices."""
        return self.tokens * DEVICES * SLOTS_A_TOKEN


def steps_of(load: str, seed: int, desk: Desk, sizes: Sizes) -> list[tuple[Load, Load]]:
    """(a load that was seen before, the load of the step), all of ``sizes.slots`` slots."""
    if load != "trained":
        return drawn_steps(load, seed, sizes)
    _, layers = desk.network(f"language-seed{seed}", partial(trained_loads, seed, sizes))
    return [
        (scaled_load(layer["before"], sizes.slots), scaled_load(step, sizes.slots))
        for layer in layers
        for step in layer["steps"]
    ]


def trained_loads(seed: int, sizes: Sizes) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A small decoder with a linear gate and no balance term; of each layer its load on validation text, and on each
    batch of test text.
    """
    torch.set_num_threads(1)
    run = small_text(sizes.windows, num_experts=EXPERTS, hidden=32, k=SLOTS_A_TOKEN)
    text = Text(length=64, vocab="bytes", measured=sizes.steps * sizes.batch)
    run = run.model_copy(update={"text": text})
    network, task, _ = train_row(run, "linear", Tuned(), seed)
    before = counted(network, task.inputs("validation"))
    steps = [counted(network, windows) for windows in task.inputs("test").split(sizes.batch)]
    return network, [{"before": first, "steps": [step[layer] for step in steps]} for layer, first in enumerate(before)]


@torch.no_grad()
def counted(network: nn.Module, windows: torch.Tensor) -> list[Load]:
    """Slots of each expert in each layer."""
    with evaluation_mode(network), record(network) as tape:
        network(windows)
    return [item.routing.load_counts().tolist() for item in tape]


def drawn_steps(load: str, seed: int, sizes: Sizes) -> list[tuple[Load, Load]]:
    """Steps in which one expert has a share of the slots and the others what chance gives them of the rest."""
    draw = random.Random(f"{load} {seed}")
    hot, moves = draw.randrange(EXPERTS), "another" in load
    before, steps = drawn(SKEWS[load], hot, draw, sizes), []
    for _ in range(sizes.steps):
        hot = draw.randrange(EXPERTS) if moves else hot
        step = drawn(SKEWS[load], hot, draw, sizes)
        steps.append((before, step))
        before = step
    return steps


def drawn(share: float, hot: int, draw: random.Random, sizes: Sizes) -> Load:
    """``share`` of the slots to one expert; the rest to all, each block of 64 to one at random."""
    rest = round(sizes.slots * (1 - share)) // 64
    blocks = Counter(draw.choices(range(EXPERTS), k=rest))
    counts = [64 * blocks[e] for e in range(EXPERTS)]
    counts[hot] += sizes.slots - 64 * rest
    return counts

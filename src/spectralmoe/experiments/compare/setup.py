"""What all cells of one comparison share, and what each is trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from spectralmoe.experiments.compare.settings import Cell, CompareSettings
from spectralmoe.terms import Term
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.tasks import Task

__all__ = ["Recipe", "Setup", "Tuned"]


class Tuned(NamedTuple):
    """What tuning may change: the learning rate, and the weight of the terms of a row; factors on the presets."""

    lr: float = 1.0
    strength: float = 1.0


class Recipe(NamedTuple):
    """An untrained network and how to train it."""

    network: nn.Module
    run: TrainSettings
    terms: Mapping[str, Term]
    optimizer: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Setup:
    """Settings, task, the folder for everything that is written, and the device."""

    settings: CompareSettings
    task: Task
    out: Path
    device: torch.device

    def recipe(self, cell: Cell, tuned: Tuned) -> Recipe:
        """What ``cell`` is trained with under the tuned factors; sets the seed of torch."""
        run = self.settings.run_of(cell, tuned.lr)
        preset = run.preset.strengthened(tuned.strength)
        return Recipe(self.task.build(run).to(self.device), run, preset.terms, preset.optimizer)

"""What all cells of one comparison share, and what each is trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from spectralmoe.data.image_data import ImageData
from spectralmoe.experiments.compare.settings import Cell, CompareSettings
from spectralmoe.models import SRMoE
from spectralmoe.presets import find_preset
from spectralmoe.terms import Term
from spectralmoe.training.network import build_network
from spectralmoe.training.settings import Optimization

__all__ = ["Recipe", "Setup", "Tuned"]


class Tuned(NamedTuple):
    """What tuning may change: the learning rate, and the weight of a row's own terms; factors on the presets."""

    lr: float = 1.0
    strength: float = 1.0


class Recipe(NamedTuple):
    """An untrained network and how to train it."""

    network: SRMoE
    budget: Optimization
    terms: Mapping[str, Term]


@dataclass(frozen=True, slots=True)
class Setup:
    """Settings, data, the folder for everything that is written, and the device."""

    settings: CompareSettings
    data: ImageData
    out: Path
    device: torch.device

    def recipe(self, cell: Cell, tuned: Tuned) -> Recipe:
        """What ``cell`` is trained with under the tuned factors; sets the seed of torch."""
        budget = self.settings.optimization
        budget = budget.model_copy(update={"seed": cell.seed, "lr": budget.lr * tuned.lr})
        network = build_network(self.data, self.settings.network, cell.router, cell.depth, cell.seed)
        terms = find_preset(cell.router).strengthened(tuned.strength).terms
        return Recipe(network.to(self.device), budget, terms)

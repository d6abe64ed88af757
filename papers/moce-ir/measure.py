"""What the card measures beside the scores: which expert gets which damage, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rows import SIDE, WIDTH
from torch import Tensor

from spectralmoe.data.degradations import DEGRADATIONS, KINDS
from spectralmoe.experiments.cards import Trained, experts_of_kinds, told_by_experts
from spectralmoe.layers import moe_layers
from spectralmoe.moe import MoE

__all__ = ["costs_by_kind", "measure"]


def measure(trained: Trained) -> dict[str, Any]:
    """How much the expert tells about the damage, of single ones alone, and operations of the experts an image."""
    (layer,) = moe_layers(trained.network).values()
    assert isinstance(layer, MoE)
    table = experts_of_kinds(trained.network, trained.task)
    single = table[[KINDS.index(kind) for kind in DEGRADATIONS]]
    costs = costs_by_kind(table, layer.experts.costs((WIDTH, SIDE, SIDE)))
    return {"told": told_by_experts(single), "loads": table.sum(0).tolist(), **costs}


def costs_by_kind(table: Tensor, costs: Tensor) -> Mapping[str, float]:
    """Millions of operations an image, from how often images of each kind met each expert (kinds, E): for each kind
    of damage and as the mean over kinds."""
    means = (table.double() @ costs / table.sum(1).clamp_min(1) / 1e6).tolist()
    return {"cost": sum(means) / len(means)} | {f"cost_{kind}": mean for kind, mean in zip(KINDS, means, strict=True)}

"""The table of an attribution: one row an expert, a neuron or a layer, with its gain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["NONE", "Level", "Table"]

Level = Literal["expert", "neuron", "layer"]

NONE = -1
"""In the place of an expert: what the layer adds beside its routed experts, or all of it at level "layer"."""


@dataclass(frozen=True, slots=True)
class Table:
    """Gains, R rows, on the CPU.

    Attributes:
        level: what a row is.
        layers: the names of the MoE layers.
        log_prob: log p of each sequence's target (B,), as the model has it.
        sequence: whose (R,) int64.
        layer: the place of its layer in ``layers`` (R,) int64.
        expert: its number (R,) int64; -1 for the shared part of a layer, and for whole layers.
        neuron: its number (R,) int64; -1 where rows are no neurons.
        weight: the combine weight (R,); 1 for the shared part and for whole layers.
        gain: in nats (R,).
    """

    level: Level
    layers: tuple[str, ...]
    log_prob: Tensor
    sequence: Tensor
    layer: Tensor
    expert: Tensor
    neuron: Tensor
    weight: Tensor
    gain: Tensor

    def __len__(self) -> int:
        return len(self.gain)

    def rows(self, count: int | None = None, *, sequence: int = 0) -> list[dict[str, Any]]:
        """The rows of one sequence, largest gain first; the first ``count`` of them."""
        mine = (self.sequence == sequence).nonzero().flatten()
        order = mine[self.gain[mine].argsort(descending=True, stable=True)][:count].tolist()
        numbers = [
            {
                "layer": self.layers[int(self.layer[r])],
                "expert": _known(self.expert[r]),
                "neuron": _known(self.neuron[r]),
                "weight": float(self.weight[r]),
                "gain": float(self.gain[r]),
            }
            for r in order
        ]
        return [{key: row[key] for key in row if key != "neuron" or self.level == "neuron"} for row in numbers]

    def of_experts(self, num_experts: int) -> Tensor:
        """The gain of every routed expert, its neurons added up: (B, layers, E); 0 where it did not serve the token."""
        sums = self.gain.new_zeros(len(self.log_prob), len(self.layers), num_experts)
        routed = self.expert >= 0
        places = (self.sequence[routed], self.layer[routed], self.expert[routed])
        return sums.index_put(places, self.gain[routed], accumulate=True)

    def of_layers(self) -> Tensor:
        """The gains of each layer's rows, added up: (B, layers).

        At level "layer" its mean over layers is what the paper calls layer efficiency; at the others it is not the
        layer's gain, since gains do not add up.
        """
        sums = self.gain.new_zeros(len(self.log_prob), len(self.layers))
        return sums.index_put((self.sequence, self.layer), self.gain, accumulate=True)


def _known(number: Tensor) -> int | None:
    return None if int(number) == NONE else int(number)


def joined(level: Level, layers: tuple[str, ...], log_prob: Tensor, rows: list[dict[str, Tensor]]) -> Table:
    """A table of pieces with the same columns."""
    names = ("sequence", "layer", "expert", "neuron", "weight", "gain")
    columns = {name: torch.cat([piece[name] for piece in rows]).cpu() for name in names}
    return Table(level, layers, log_prob.cpu(), **columns)

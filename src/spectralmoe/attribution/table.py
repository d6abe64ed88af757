"""The table of an attribution: it has one row for each expert, neuron or layer, with its gain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["NONE", "Level", "Table"]

Level = Literal["expert", "neuron", "layer"]

NONE = -1
"""The number in ``expert`` for what a layer adds beside its routed experts, or, at level "layer", for all it adds."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of R gains, what ``attribute_experts`` returns; its tensors are on the CPU.

    Attributes:
        level: what a row is, "expert", "neuron" or "layer".
        layers: the names of the MoE layers.
        log_prob: the model's log-probability of each sequence's target (B,).
        sequence: the sequence of each row (R,) int64.
        layer: the place of the row's layer in ``layers`` (R,) int64.
        expert: the row's expert (R,) int64; -1 for the shared part of a layer, and for whole layers.
        neuron: the row's hidden unit (R,) int64; -1 if rows are no neurons.
        weight: the combine weight (R,); 1 for the shared part and for whole layers.
        gain: the gain in nats (R,).
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
        """Return the rows of one sequence as dicts, the largest gain first; only ``count`` of them, if given."""
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
        """Return the gain of every routed expert, its neurons added up: (B, layers, E); 0 if it was not chosen."""
        sums = self.gain.new_zeros(len(self.log_prob), len(self.layers), num_experts)
        routed = self.expert >= 0
        places = (self.sequence[routed], self.layer[routed], self.expert[routed])
        return sums.index_put(places, self.gain[routed], accumulate=True)

    def of_layers(self) -> Tensor:
        """Return the sum of the gains of each layer's rows: (B, layers).

        At level "layer" this is the layer's gain, whose mean over layers the paper calls layer efficiency. At the other
        levels it is not, since gains do not add up.
        """
        sums = self.gain.new_zeros(len(self.log_prob), len(self.layers))
        return sums.index_put((self.sequence, self.layer), self.gain, accumulate=True)


def _known(number: Tensor) -> int | None:
    return None if int(number) == NONE else int(number)


def joined(level: Level, layers: tuple[str, ...], log_prob: Tensor, rows: list[dict[str, Tensor]]) -> Table:
    """Join pieces with the same columns to one table."""
    names = ("sequence", "layer", "expert", "neuron", "weight", "gain")
    columns = {name: torch.cat([piece[name] for piece in rows]).cpu() for name in names}
    return Table(level, layers, log_prob.cpu(), **columns)

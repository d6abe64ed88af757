"""What is known of one layer when its values are measured: weights, sums over a run, sampled tokens, outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from spectralmoe.diagnostics.measure import Measure
from spectralmoe.diagnostics.similarity import cosine_matrix
from spectralmoe.diagnostics.stability import sound_flips
from spectralmoe.diagnostics.statistics import LayerStatistics
from spectralmoe.diagnostics.watch import Watched

__all__ = ["Evidence"]


def _nothing() -> Tensor:
    return torch.empty(0, 0)


@dataclass(frozen=True)
class Evidence:
    """What the values of the table are functions of; what was not looked at stays empty.

    Attributes:
        counts: exact counts of the slots of each expert.
        statistics: sums over the routings that were looked at.
        matrix: the routing matrix (E, D).
        weight_cosines: cosines of the experts' weights (E, E); None where they were not read or differ in size.
        weights: how many numbers those cosines rest on, and what they are.
        layer: routes tokens again and runs its experts; None for weights that are not run.
        tokens: a sample of what the router read (N, D).
        outputs: some of these tokens through every expert (E, n, D).
        labels: slots of each label's tokens in each expert (labels, E).
        seed: of draws.
        sound: ``sound_flips``, or a form of it that remembers.
    """

    counts: LayerStatistics
    statistics: LayerStatistics
    matrix: Tensor = field(default_factory=_nothing)
    weight_cosines: Tensor | None = None
    weights: tuple[int, str] = (0, "weights")
    layer: Watched | None = None
    tokens: Tensor = field(default_factory=_nothing)
    outputs: Tensor = field(default_factory=lambda: torch.empty(0, 0, 1))
    labels: Tensor = field(default_factory=_nothing)
    seed: int = 0
    sound: Callable[[int, int | None, int, int], Measure] = sound_flips

    @cached_property
    def output_cosines(self) -> Tensor:
        """``cosine_matrix`` of the outputs (E, E)."""
        return cosine_matrix(self.outputs)

    @property
    def watched(self) -> Watched:
        """The layer, of values that need it to run."""
        assert self.layer is not None
        return self.layer

    def sound_router(self) -> Measure:
        """``sound_flips`` for the sizes of this layer and its sample of tokens."""
        empty = not self.matrix.numel()
        experts = self.watched.num_experts if empty else len(self.matrix)
        width = self.tokens.shape[-1] if empty else self.matrix.shape[1]
        return self.sound(experts, self.watched.top_k, width, len(self.tokens))

"""Evidence: all that is known of one layer, from which its diagnostic values are computed."""

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
    """What is known of one layer, the argument of every function in ``VALUES``; what is not known stays empty.

    Attributes:
        counts: exact counts of the slots of each expert.
        statistics: sums over the recorded routings.
        matrix: the routing matrix (E, D).
        weight_cosines: the cosines of the experts' weights (E, E); None if they were not read or differ in size.
        weights: on how many numbers those cosines rest, and the name of these numbers.
        layer: the layer, which can route tokens and run experts; None if only its weights are there.
        tokens: a sample of what the router read (N, D).
        outputs: the outputs of every expert for n of these tokens (E, n, D).
        labels: the number of slots of each label in each expert (labels, E).
        seed: the seed of random draws.
        sound: ``sound_flips``, or a form of it that caches results.
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
        """The layer, for values that run it."""
        assert self.layer is not None
        return self.layer

    def sound_router(self) -> Measure:
        """Return ``sound_flips`` for the sizes of this layer and its sample of tokens."""
        empty = not self.matrix.numel()
        experts = self.watched.num_experts if empty else len(self.matrix)
        width = self.tokens.shape[-1] if empty else self.matrix.shape[1]
        return self.sound(experts, self.watched.top_k, width, len(self.tokens))

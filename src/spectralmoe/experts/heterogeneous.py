"""Experts of unequal cost and reach.

Zamfir et al., "Complexity Experts are Task-Discriminative Learners for Any Image Restoration" (MoCE-IR), arXiv
2411.18466: the bank; the authors' expert is ``PatchMixer``, their balance loss ``complexity_balance``.
Differs: the cost of an expert is counted, or said, instead of its number of parameters, which leaves out what the reach
of an expert costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from spectralmoe.errors import UserError
from spectralmoe.experts.modules import ModuleExperts
from spectralmoe.stacks import chosen_experts

__all__ = ["HeterogeneousExperts"]


class HeterogeneousExperts(ModuleExperts):
    """A bank of modules that differ in cost and reach, each mapping rows (M, *S) to rows of that shape.

    Only the modules that a row chose run on it. Whole maps take ``MoE(..., unit=Sample())``.

    Args:
        costs: of each module on one row, in place of counted operations: terms read their ratios, comparisons take
            them for operations. None: counted, see ``costs()``.

    Raises:
        UserError: costs that are not one positive number a module.

    >>> from spectralmoe.experts import PatchMixer
    >>> bank = HeterogeneousExperts([PatchMixer(16, rank, window) for rank, window in ((4, 2), (8, 4), (16, 8))])
    >>> (bank.costs((16, 8, 8)) / 1e6).tolist()
    [0.03456, 0.089088, 0.242688]
    """

    def __init__(self, modules: Sequence[nn.Module], *, costs: Sequence[float] | None = None) -> None:
        super().__init__(modules)
        self.given = None if costs is None else [float(cost) for cost in costs]
        if self.given is None:
            return
        if len(self.given) != len(modules) or not all(math.isfinite(cost) and cost > 0 for cost in self.given):
            raise UserError(
                f"HeterogeneousExperts: costs must be one positive number for each of {len(modules)} modules, got "
                f"{self.given}"
            )

    def spec_arguments(self) -> dict[str, object]:
        """Constructor arguments that are not attributes of the same name."""
        return {**super().spec_arguments(), "costs": self.given}

    def costs(self, shape: Sequence[int] = ()) -> Tensor:
        """The costs that were given (E,), of any row; else as ``ModuleExperts`` counts them."""
        return super().costs(shape) if self.given is None else torch.tensor(self.given, dtype=torch.float64)

    def select(self, indices: Sequence[int] | Tensor) -> HeterogeneousExperts:
        bank = cast(HeterogeneousExperts, super().select(indices))
        chosen = chosen_experts("HeterogeneousExperts.select", indices, self.num_experts)
        return bank._costing(chosen, self.given)

    def averaged(
        self, groups: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None = None
    ) -> HeterogeneousExperts:
        """As of any modules, which have to be built alike; a mean costs what the first of its group does."""
        bank = cast(HeterogeneousExperts, super().averaged(groups, weights))
        return bank._costing([group[0] for group in groups], self.given)

    def _costing(self, of: Sequence[int], given: list[float] | None) -> HeterogeneousExperts:
        self.given = None if given is None else [given[e] for e in of]
        return self

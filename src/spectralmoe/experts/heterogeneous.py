"""Heterogeneous experts: modules of unequal cost and receptive field.

Zamfir et al., "Complexity Experts are Task-Discriminative Learners for Any Image Restoration" (MoCE-IR), arXiv
2411.18466: the bank; the authors' expert is ``PatchMixer``, their balance loss ``complexity_balance``.
Differs: the cost of an expert is its operations, or a given number. The paper takes the number of parameters, which
does not see what a larger receptive field costs.
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
    """Holds modules of unequal cost as experts; each maps rows (M, *S) to rows of the same shape.

    Only the modules that a row chose run on it. For whole maps use ``MoE(..., unit=Sample())``.

    Args:
        modules: the experts.
        costs: the cost of each module on one row. Regularizers read their ratios; comparisons take them for
            floating-point operations. None counts the operations (``ModuleExperts.costs``).

    Raises:
        UserError: ``costs`` is not one positive number for each module.

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
        """Return the constructor arguments that are not attributes of the same name."""
        return {**super().spec_arguments(), "costs": self.given}

    def costs(self, shape: Sequence[int] = ()) -> Tensor:
        """Return the costs (E,) that were given, whatever the shape; else those that ``ModuleExperts`` counts."""
        return super().costs(shape) if self.given is None else torch.tensor(self.given, dtype=torch.float64)

    def select(self, indices: Sequence[int] | Tensor) -> HeterogeneousExperts:
        bank = cast(HeterogeneousExperts, super().select(indices))
        chosen = chosen_experts("HeterogeneousExperts.select", indices, self.num_experts)
        return bank._costing(chosen, self.given)

    def averaged(
        self, groups: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None = None
    ) -> HeterogeneousExperts:
        """Return a bank of means, as ``ModuleExperts.averaged``; a mean has the cost of the first of its group."""
        bank = cast(HeterogeneousExperts, super().averaged(groups, weights))
        return bank._costing([group[0] for group in groups], self.given)

    def _costing(self, of: Sequence[int], given: list[float] | None) -> HeterogeneousExperts:
        self.given = None if given is None else [given[e] for e in of]
        return self

"""Experts: a bank of E networks D -> D that sees rows sorted by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.parts import Part

__all__ = ["Experts"]


class Experts(Part):
    """Base of all expert banks. A subclass must define ``expert``; the rest has slow, correct defaults.

    A bank whose experts have a hidden layer defines ``hidden`` and ``project`` as well, so that the hidden
    activations can be recorded.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        if num_experts < 1:
            raise UserError(f"{type(self).__name__}: num_experts must be at least 1, got {num_experts}")
        self.num_experts = num_experts

    def expert(self, x: Tensor, e: int) -> Tensor:
        """The definition: expert ``e`` applied to x (M, D) -> (M, D)."""
        raise NotImplementedError

    def forward(self, x: Tensor, counts: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """All experts on rows sorted by expert: x (M, D), counts (E,) int64 -> (M, D), or (y, gain (M,)).

        A gain multiplies the combine weight of its row. An expert without rows gets an empty batch: its gradient is
        zero then and not missing, which DDP would take for an unused parameter.
        """
        sizes = counts.tolist()
        blocks = x.split([*sizes, x.shape[0] - sum(sizes)])
        outputs = [self.expert(block, e) for e, block in enumerate(blocks[:-1])]
        return torch.cat([*outputs, torch.zeros_like(blocks[-1])])

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        """The dense form: sum_e weights[:, e] * expert_e(x), for x (N, D) and weights (N, E)."""
        outputs = [weights[:, e, None] * self.expert(x, e) for e in range(self.num_experts)]
        return torch.stack(outputs).sum(0)

    def hidden(self, x: Tensor, counts: Tensor) -> Tensor | None:
        """Hidden activations (M, H) of rows sorted by expert; None if the bank has none to show.

        Where there are any, ``forward(x)`` must be ``project(hidden(x))``, gain included.
        """
        return None

    def project(self, hidden: Tensor, counts: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """What ``forward`` returns, from what ``hidden`` returned."""
        raise NotImplementedError

    def expert_parameters(self, e: int) -> dict[str, Tensor]:
        """Views of the parameters that belong to expert ``e`` alone; empty: it cannot be adapted alone."""
        return {}

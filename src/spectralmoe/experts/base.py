"""Experts: a bank of E networks D -> D that sees rows sorted by expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spectralmoe.context import Rows
from spectralmoe.errors import UserError
from spectralmoe.parts import Part
from spectralmoe.stacks import chosen_experts, copy_with

__all__ = ["Experts"]


class Experts(Part):
    """Base of all expert banks. A subclass must define ``expert``; the rest has slow, correct defaults.

    A bank whose experts have a hidden layer defines ``hidden`` and ``project`` as well, so that the hidden
    activations can be recorded. The rows of a bank that names side information in ``reads`` are D + P wide: what it
    reads stands behind the token, in that order.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        if num_experts < 1:
            raise UserError(f"{type(self).__name__}: num_experts must be at least 1, got {num_experts}")
        self.num_experts = num_experts

    def beside(self, x: Tensor, context: Rows | None) -> Tensor:
        """Tokens x (N, D) with what the bank ``reads`` of the context behind them: (N, D + P)."""
        read = [self.read(context, name, len(x)).to(x.dtype) for name in self.reads]
        return torch.cat([x, *read], -1) if read else x

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
        return torch.cat([*outputs, outputs[0].new_zeros(len(blocks[-1]), *outputs[0].shape[1:])])

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

    def select(self, indices: Sequence[int] | Tensor) -> Experts:
        """A bank of the experts ``indices``, in this order, in memory of its own and with the same bits.

        An expert may stand several times. As ``averaged``, this takes every parameter and buffer for a stack of one
        entry an expert; a bank that holds others overrides both.

        Raises:
            UserError: no index, or one out of range; a tensor that is no such stack.

        >>> from spectralmoe import FeedForward
        >>> bank = FeedForward(4, dim=8, hidden=16)
        >>> torch.equal(bank.select([2, 0]).up[0], bank.up[2])
        True
        """
        chosen = chosen_experts(f"{type(self).__name__}.select", indices, self.num_experts)
        return self._restacked(lambda stack: stack[chosen], len(chosen))

    def averaged(self, groups: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None = None) -> Experts:
        r"""A bank of one expert a group, with the weighted means of the members' tensors.

        .. math:: \theta_g = \sum_{i \in g} w_{gi} \theta_i \Big/ \sum_{i \in g} w_{gi}

        Computed in float64. An expert may be in several groups, or in none; a group of one keeps its values.

        Args:
            groups: the members of each group.
            weights: one number for each member, not negative; None: all alike.

        Raises:
            UserError: as ``select``; an empty group; weights that do not go with the groups, or are all 0 in one.
        """
        members, shares = self._shares(groups, weights)

        def mean(stack: Tensor) -> Tensor:
            if not stack.is_floating_point():
                raise UserError(f"{type(self).__name__}.averaged: a buffer of {stack.dtype} has no mean")
            means = [
                torch.tensordot(share.to(stack.device), stack[group].double(), 1)
                for group, share in zip(members, shares, strict=True)
            ]
            return torch.stack(means)

        return self._restacked(mean, len(members))

    def _shares(
        self, groups: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None
    ) -> tuple[list[list[int]], list[Tensor]]:
        """The members of each group, and their weights (n,) with sum 1."""
        owner = f"{type(self).__name__}.averaged"
        members = [chosen_experts(owner, group, self.num_experts) for group in groups]
        given = [[1.0] * len(group) for group in members] if weights is None else weights
        if not members or [len(row) for row in given] != [len(group) for group in members]:
            raise UserError(f"{owner}: needs at least one group, and a weight for each of its members")
        shares = [torch.tensor(row, dtype=torch.float64) for row in given]
        for group, share in zip(members, shares, strict=True):
            if not (share.isfinite().all() and (share >= 0).all() and share.sum() > 0):
                raise UserError(
                    f"{owner}: weights must be finite, not negative and not all 0; {group} has {share.tolist()}"
                )
        return members, [share / share.sum() for share in shares]

    def _restacked(self, change: Callable[[Tensor], Tensor], num_experts: int) -> Experts:
        """A copy of ``num_experts`` experts, with ``change`` done to every stack."""
        stacks = [*self.named_parameters(), *self.named_buffers()]
        for name, stack in stacks:
            if not stack.dim() or len(stack) != self.num_experts:
                raise UserError(
                    f"{type(self).__name__} cannot be taken apart: {name!r} of shape {tuple(stack.shape)} is no stack "
                    f"of E={self.num_experts} experts"
                )
        bank = copy_with(self, {stack: change(stack.detach()) for _, stack in stacks})
        bank.num_experts = num_experts
        return bank

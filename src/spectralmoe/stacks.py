"""Functions for stacks, tensors with one entry an expert: they choose entries, average them, and copy modules."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from spectralmoe.errors import UserError

__all__ = ["chosen_experts", "copy_with", "means", "shares_of"]

Module = TypeVar("Module", bound=nn.Module)


def chosen_experts(owner: str, indices: Sequence[int] | Tensor, num_experts: int) -> list[int]:
    """Return ``indices`` as a list of whole numbers from 0 to E - 1.

    Raises:
        UserError: it is empty, or an entry is no expert; the message begins with ``owner``.
    """
    chosen = indices.tolist() if isinstance(indices, Tensor) else list(indices)
    if not chosen:
        raise UserError(f"{owner}: no expert was named; name at least one of the E={num_experts}")
    for e in chosen:
        if not isinstance(e, int) or isinstance(e, bool) or not 0 <= e < num_experts:
            raise UserError(
                f"{owner}: there is no expert {e!r}; the E={num_experts} experts are 0 to {num_experts - 1}"
            )
    return chosen


@torch.no_grad()
def copy_with(module: Module, tensors: Mapping[Tensor, Tensor]) -> Module:
    """Return a copy of ``module`` with some tensors replaced: old parameter or buffer -> new values.

    A new parameter has the dtype of the old one, and takes a gradient if the old one did.
    """
    memo: dict[int, object] = {}
    for old, new in tensors.items():
        new = new.to(old.dtype)
        memo[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    return copy.deepcopy(module, memo)


def shares_of(
    owner: str, groups: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None, num_experts: int
) -> tuple[list[list[int]], list[Tensor]]:
    """Return the members of each group, and their weights (n,) float64 with sum 1.

    Args:
        weights: one number >= 0 for each member; None weighs all alike.

    Raises:
        UserError: as ``chosen_experts``; the weights do not fit the groups or are all 0 in one.

    >>> shares_of("merge", [[1], [0, 2]], [[1.0], [3.0, 1.0]], 3)[1][1].tolist()
    [0.75, 0.25]
    """
    members = [chosen_experts(owner, group, num_experts) for group in groups]
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


def means(stack: Tensor, groups: Sequence[Sequence[int]], shares: Sequence[Tensor]) -> Tensor:
    """Compute weighted means of the entries of ``stack`` (E, ...), one for each group: (G, ...) float64.

    Args:
        groups: the members of each group.
        shares: their weights (n,) float64, with sum 1.

    >>> means(torch.tensor([[1.0], [2.0], [4.0]]), [[1], [0, 2]], [torch.ones(1), torch.tensor([0.75, 0.25])]).tolist()
    [[2.0], [1.75]]
    """
    return torch.stack(
        [
            torch.tensordot(share.to(stack.device, torch.float64), stack[list(group)].double(), 1)
            for group, share in zip(groups, shares, strict=True)
        ]
    )

"""Functions that let all code accept sharded parameters (DTensor) as well as plain ones.

``torch.distributed.tensor`` takes half a second to import, so it is imported only when there is a sharded tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["assign_", "beside", "full", "is_sharded", "local", "sharded_as"]


def is_sharded(x: Tensor | None) -> TypeGuard[DTensor]:
    """Return whether x is a DTensor.

    >>> is_sharded(torch.ones(2))
    False
    """
    return hasattr(x, "full_tensor")


def full(x: Tensor) -> Tensor:
    """Return the whole tensor of ``x``: gathered, with gradient, if it is sharded, else ``x`` itself."""
    return x.full_tensor() if is_sharded(x) else x


def local(x: Tensor) -> Tensor:
    """Return this process's part of ``x``, or ``x`` itself if it is not sharded."""
    return x.to_local() if is_sharded(x) else x


def sharded_as(value: Tensor, target: Tensor | None) -> Tensor:
    """Shard the whole tensor ``value`` as ``target`` is sharded."""
    if not is_sharded(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


def beside(value: Tensor, target: Tensor) -> Tensor:
    """Prepare ``value``, whole on every rank, for operations with ``target``: replicate it if that is sharded."""
    if not is_sharded(target):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(value, target.device_mesh, [Replicate()] * target.device_mesh.ndim, run_check=False)


@torch.no_grad()
def assign_(target: Tensor, value: Tensor) -> None:
    """Write the whole tensor ``value`` into ``target`` in place, sharded as ``target`` is."""
    target.copy_(sharded_as(value, target))

"""Sharded parameters (DTensor), which everything accepts.

``torch.distributed.tensor`` takes half a second to import, so it is not imported before there is a sharded tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["assign_", "beside", "full", "is_sharded", "local", "sharded_as"]


def is_sharded(x: Tensor | None) -> TypeGuard[DTensor]:
    """Whether x is a DTensor.

    >>> is_sharded(torch.ones(2))
    False
    """
    return hasattr(x, "full_tensor")


def full(x: Tensor) -> Tensor:
    """The whole tensor behind ``x``: gathered (with gradient) when it is sharded, else ``x`` itself."""
    return x.full_tensor() if is_sharded(x) else x


def local(x: Tensor) -> Tensor:
    """This process's part of ``x``."""
    return x.to_local() if is_sharded(x) else x


def sharded_as(value: Tensor, target: Tensor | None) -> Tensor:
    """The whole tensor ``value``, sharded as ``target`` is."""
    if not is_sharded(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


def beside(value: Tensor, target: Tensor) -> Tensor:
    """``value``, which every rank has whole, for operations with ``target``: replicated where that is sharded."""
    if not is_sharded(target):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(value, target.device_mesh, [Replicate()] * target.device_mesh.ndim, run_check=False)


@torch.no_grad()
def assign_(target: Tensor, value: Tensor) -> None:
    """Write the whole tensor ``value`` into ``target`` in place, sharding it as ``target`` is sharded."""
    target.copy_(sharded_as(value, target))

"""Sends rows between devices as a plan says, in one exchange to the experts and one back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spectralmoe.parallel.plan import Plan

__all__ = ["Route", "exchange", "route_rows"]


@dataclass(frozen=True, slots=True)
class Route:
    """Says which rows one device sends and receives, as sizes and permutations.

    Attributes:
        order: (M,) the device's rows in the order in which they are sent.
        sends, receives: the number of rows to and from each of the P devices.
        by_expert: (R,) the received rows in the order of the experts that are computed here.
        counts: (L + G,) int64 on the CPU, the rows of each expert here: the L of this device, then the G guests.
        guests: the experts of other devices that are computed here.
    """

    order: Tensor
    sends: list[int]
    receives: list[int]
    by_expert: Tensor
    counts: Tensor
    guests: list[int]


def route_rows(plan: Plan, counts: Tensor, rank: int, device: torch.device | str = "cpu") -> Route:
    """Compute which rows device ``rank`` sends and receives under a plan.

    Args:
        plan: a plan of the load of all devices together.
        counts: (P, E) int64 on the CPU, the rows that each device has for each expert; the rows are sorted by expert.
        rank: the number of the device.
        device: where the permutations are put.

    >>> from spectralmoe.parallel import plan_native
    >>> counts = torch.tensor([[1, 2], [3, 0]])
    >>> route = route_rows(plan_native(counts.sum(0), 2), counts, rank=0)
    >>> route.sends, route.receives, route.counts.tolist()
    ([1, 2], [1, 3], [4])
    """
    pieces = sorted((part.device, e, part.start, part.end) for e, parts in enumerate(plan.intervals) for part in parts)
    where, expert, start, end = torch.tensor(pieces, dtype=torch.int64).view(-1, 4).unbind(1)
    first = counts.cumsum(0) - counts  # where the rows of a device begin in the global order of an expert
    begin = torch.maximum(start, first[:, expert])
    sizes = (torch.minimum(end, (first + counts)[:, expert]) - begin).clamp_min(0)  # (P, pieces)

    here = counts[rank].cumsum(0) - counts[rank]
    order = _ranges((here[expert] + begin[rank] - first[rank, expert]), sizes[rank])
    sends = torch.zeros(plan.devices, dtype=torch.int64).index_add_(0, where, sizes[rank])

    mine = where == rank
    own = [e for e, homes in enumerate(plan.homes) if homes[0] == rank]
    guests = sorted(set(expert[mine].tolist()) - set(own))
    place = {e: slot for slot, e in enumerate([*own, *guests])}
    slots = torch.tensor([place[e] for e in expert[mine].tolist()], dtype=torch.int64)
    arrived = sizes[:, mine]
    arrival = (arrived.flatten().cumsum(0) - arrived.flatten()).view_as(arrived)
    turn = slots.argsort(stable=True)
    by_expert = _ranges(arrival.T[turn].flatten(), arrived.T[turn].flatten())
    computed = torch.zeros(len(place), dtype=torch.int64).index_add_(0, slots, arrived.sum(0))
    return Route(
        order.to(device, non_blocking=True),
        sends.tolist(),
        arrived.sum(1).tolist(),
        by_expert.to(device, non_blocking=True),
        computed,
        guests,
    )


def exchange(rows: Tensor, sends: Sequence[int], receives: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Send rows (M, *S), the first ``sends[0]`` to device 0 and so on, and return the received ones.

    Every device of the group must call it, also without rows. Gradients travel back the same way.
    """
    return _Exchange.apply(rows, list(sends), list(receives), group)  # type: ignore[no-any-return]


class _Exchange(torch.autograd.Function):
    """all-to-all; backward is the same with sizes swapped."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sends, ctx.receives, ctx.group = sends, receives, group
        return _all_to_all(rows, sends, receives, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.receives, ctx.sends, ctx.group), None, None, None


def _all_to_all(rows: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
    came = rows.new_empty(sum(receives), *rows.shape[1:])
    dist.all_to_all_single(came, rows.contiguous(), receives, sends, group=group)
    return came


def _ranges(starts: Tensor, sizes: Tensor) -> Tensor:
    """start, start + 1, ... of each range, ``sizes`` long, one after the other."""
    shifts = starts - (sizes.cumsum(0) - sizes)
    return torch.arange(int(sizes.sum())) + shifts.repeat_interleave(sizes)

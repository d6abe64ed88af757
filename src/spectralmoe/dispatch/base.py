"""Dispatch: how tokens get to their experts and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from spectralmoe.experts import Experts
from spectralmoe.routing import Routing, count_slots

__all__ = ["Dispatch", "SortedSlots", "combine", "expert_weights", "sort_slots", "spread"]


class Dispatch(Protocol):
    """Sends x (N, D) through the chosen experts and adds up their weighted outputs: (N, D)."""

    def __call__(self, x: Tensor, routing: Routing, experts: Experts) -> Tensor: ...


def expert_weights(routing: Routing, num_experts: int) -> Tensor:
    """The combine weights as a dense (N, E) matrix; empty slots and zero experts leave no trace."""
    dense = routing.weights.new_zeros(routing.weights.shape[0], num_experts + 1)
    used = (routing.indices >= 0) & (routing.indices < num_experts)
    return dense.scatter_add(1, torch.where(used, routing.indices, num_experts), routing.weights)[:, :num_experts]


@dataclass(frozen=True, slots=True)
class SortedSlots:
    """The slots of all tokens in expert order; slot s of the flat (N * K) list belongs to token s // K.

    Attributes:
        order: (M,) flat slot of each sorted row.
        place: (N * K,) sorted row of each flat slot; M where the slot has no row.
        counts: (E,) int64 rows of each expert, first expert first.
        slots: K.
        full: every slot has a row, so M = N * K.
    """

    order: Tensor
    place: Tensor
    counts: Tensor
    slots: int
    full: bool


def sort_slots(routing: Routing, num_experts: int) -> SortedSlots:
    """Sort the filled slots by expert, stably.

    Under ``torch.compile`` the shapes stay static: slots without an expert are sorted to the end and kept. Else they
    are cut off, which costs a device synchronisation and saves the memory and work of N * K - M rows; where the router
    says that all slots are filled, and knows no zero experts, nobody asks the device.
    """
    flat = routing.indices.reshape(-1)
    key = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    order = key.argsort(stable=True)
    counts = count_slots(flat, num_experts)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    rows = order.shape[0]
    if not (torch.compiler.is_compiling() or (routing.full and routing.num_experts <= num_experts)):
        rows = int(counts.sum())
        order, place = order[:rows], place.clamp_max(rows)
    return SortedSlots(order, place, counts, routing.indices.shape[1], rows == flat.shape[0])


def spread(x: Tensor, slots: SortedSlots) -> Tensor:
    """Rows (M, D) in expert order from tokens x (N, D): row r is the token of slot ``order[r]``."""
    return _Spread.apply(x, slots)  # type: ignore[no-any-return]


def combine(result: Tensor | tuple[Tensor, Tensor], weights: Tensor, slots: SortedSlots) -> Tensor:
    """Tokens (N, D): for each, the sum over its slots of weight (N, K) times what the bank made of its row.

    Gathers by the inverse permutation instead of scattering, so the sum has a fixed order on every device.

    Args:
        result: rows (M, D) of the bank, or (rows, gain (M,)).
    """
    if isinstance(result, tuple):
        rows, gain = result
        weights = weights * _by_slot(gain[:, None].to(weights.dtype), slots).view_as(weights)
    else:
        rows = result
    if torch.compiler.is_compiling():  # static shapes: behind the last block a bank may leave anything
        tail = torch.arange(rows.shape[0], device=rows.device) >= slots.counts.sum()
        rows = rows.masked_fill(tail[:, None], 0)
    return _Combine.apply(rows, weights, slots)  # type: ignore[no-any-return]


def _by_slot(rows: Tensor, slots: SortedSlots) -> Tensor:
    """The row of each flat slot (N * K, ...); zero where a slot has none."""
    if not slots.full:
        rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
    return rows.index_select(0, slots.place)


class _Spread(torch.autograd.Function):
    """x[order // K]; the gradient gathers by the inverse permutation and sums over K."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: SortedSlots) -> Tensor:
        ctx.slots = slots
        return x.index_select(0, slots.order if slots.slots == 1 else slots.order // slots.slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        by_slot = _by_slot(grad, ctx.slots)
        k = ctx.slots.slots
        return by_slot if k == 1 else by_slot.unflatten(0, (-1, k)).sum(1), None


class _Combine(torch.autograd.Function):
    """Weights (N, K) times the rows of their slots, summed over K, without an (N, K, D) product in either direction."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, slots: SortedSlots) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.slots = slots
        by_slot = _by_slot(rows, slots)
        if slots.slots == 1:
            return by_slot.mul_(weights)
        return torch.bmm(weights.unsqueeze(1), by_slot.unflatten(0, (-1, slots.slots))).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights = ctx.saved_tensors
        slots = ctx.slots
        by_row = spread(grad, slots)
        d_weights = _by_slot(torch.linalg.vecdot(by_row, rows), slots).view_as(weights)
        return by_row * weights.flatten().index_select(0, slots.order)[:, None], d_weights, None

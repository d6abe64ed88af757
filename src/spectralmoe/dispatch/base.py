"""Dispatch: how tokens get to their experts and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from spectralmoe.experts import Experts
from spectralmoe.routing import Routing, count_slots

__all__ = ["Dispatch", "SortedSlots", "combine", "expert_rows", "expert_weights", "gather_tokens", "sort_slots"]


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
    are cut off, which costs a device synchronisation and saves the memory and work of M - N * K rows.
    """
    flat = routing.indices.reshape(-1)
    key = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    order = key.argsort(stable=True)
    counts = count_slots(flat, num_experts)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    rows = order.shape[0]
    if not torch.compiler.is_compiling():
        rows = int(counts.sum())
        order, place = order[:rows], place.clamp_max(rows)
    return SortedSlots(order, place, counts, routing.indices.shape[1], rows == flat.shape[0])


def gather_tokens(x: Tensor, slots: SortedSlots) -> Tensor:
    """Rows (M, D) in expert order from tokens x (N, D); rows behind the last block are zero."""
    rows: Tensor = _Gather.apply(x, slots)
    return _blank_tail(rows, slots.counts)


def expert_rows(result: Tensor | tuple[Tensor, Tensor], slots: SortedSlots) -> Tensor:
    """Rows (M, D) of what a bank returned, its gain multiplied in; what undefined rows hold reaches no gradient."""
    if not isinstance(result, tuple):
        return result
    rows, gain = result
    return _blank_tail(rows, slots.counts) * gain[:, None].to(rows.dtype)


def combine(rows: Tensor, weights: Tensor, slots: SortedSlots) -> Tensor:
    """Sum over K of weights (N, K) times the row of each slot: (N, D).

    Gathers by the inverse permutation instead of scattering, so the sum has a fixed order on every device.
    """
    by_slot: Tensor = _Ungather.apply(_blank_tail(rows, slots.counts), slots)
    by_token = by_slot.view(weights.shape[0], slots.slots, rows.shape[1])
    if slots.slots == 1:
        return by_token.squeeze(1) * weights
    return (by_token * weights.unsqueeze(-1)).sum(1)


def _blank_tail(rows: Tensor, counts: Tensor) -> Tensor:
    """Zero the rows behind the last block, in both directions; there are none unless the shapes are static."""
    if not torch.compiler.is_compiling():
        return rows
    tail = torch.arange(rows.shape[0], device=rows.device) >= counts.sum()
    return rows.masked_fill(tail[:, None], 0)


def _padded(rows: Tensor, full: bool) -> Tensor:
    """Rows with one zero row behind them, for slots without a row."""
    return rows if full else torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


class _Gather(torch.autograd.Function):
    """x[order // K]; the gradient gathers by the inverse permutation and sums over K."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: SortedSlots) -> Tensor:
        ctx.save_for_backward(slots.place)
        ctx.k, ctx.full = slots.slots, slots.full
        return x.index_select(0, slots.order // slots.slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        by_slot = _padded(grad, ctx.full).index_select(0, place)
        return by_slot.view(-1, ctx.k, grad.shape[1]).sum(1), None


class _Ungather(torch.autograd.Function):
    """rows[place], zero where a slot has no row; the gradient gathers by ``order``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: SortedSlots) -> Tensor:
        ctx.save_for_backward(slots.order)
        return _padded(rows, slots.full).index_select(0, slots.place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order), None

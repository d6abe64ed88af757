"""The base class of dispatches, and the steps of the sorted form: sort the slots, run the experts, add up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.experts.answer import Answer, per_row
from spectralmoe.experts.base import Experts, answer_of
from spectralmoe.routing import Routing, count_slots
from spectralmoe.torch_private import transforming

__all__ = ["Dispatch", "Kept", "SortedSlots", "combine", "sort_slots", "spread"]


@dataclass(frozen=True, slots=True)
class SortedSlots:
    """The slots of all tokens, sorted by expert: flat slot s of the N * K slots belongs to token s // K.

    Attributes:
        order: (M,) the flat slot of each sorted row.
        place: (N * K,) the sorted row of each flat slot; M if the slot has no row.
        counts: (E,) int64, the number of rows of each expert; on the CPU if the bank reads them there.
        slots: K.
        full: whether every slot has a row, so that M = N * K.
    """

    order: Tensor
    place: Tensor
    counts: Tensor
    slots: int
    full: bool


@dataclass(frozen=True, slots=True)
class Kept:
    """The tensors of one forward that a tape asked for, with rows sorted by expert.

    Attributes:
        slots: which slot each row belongs to.
        tensors: name -> (M, ...).
    """

    slots: SortedSlots
    tensors: dict[str, Tensor]

    def only(self, names: tuple[str, ...]) -> Kept:
        """Return a copy with the named tensors alone."""
        return Kept(self.slots, {name: self.tensors[name] for name in names if name in self.tensors})

    def filled(self, rows: Tensor) -> Tensor:
        """Return ``rows`` without those of empty slots, which a compiled forward leaves at the end."""
        return rows[: int(self.slots.counts.sum())]


class Dispatch:
    """The base class of dispatches: ``dispatch(x, routing, experts)`` returns the weighted sum of the experts' outputs.

    x is (N, D) for tokens, or (N, *S) for pixels and samples.
    """

    of_machine = False
    """Whether the dispatch depends on the devices at hand; a saved layer then has "auto" in its place."""

    def __call__(self, x: Tensor, routing: Routing, experts: Experts) -> Tensor:
        raise NotImplementedError

    def keeping(self, x: Tensor, routing: Routing, experts: Experts, names: frozenset[str]) -> tuple[Tensor, Kept]:
        """Return the same sum, and the tensors on the way that a tape asks for.

        Args:
            names: the names of these tensors, such as "input", "hidden" and "output".

        Raises:
            UserError: "hidden" is asked for and the experts have no hidden layer; or it is called inside a transform of
                ``torch.func``.
        """
        if transforming():
            raise UserError("record() cannot keep tensors inside a transform of torch.func; record without keep")
        slots = sort_slots(routing, experts.num_experts, on_host=experts.reads_loads(x))
        rows = spread(x, slots)
        answer, hidden = self.answer(rows, slots.counts, experts, hidden="hidden" in names)
        tensors = {"input": rows, "output": answer.gained, **(answer.said or {})}
        if hidden is not None:
            tensors["hidden"] = hidden
        return combine(answer, routing.weights.to(x.dtype), slots), Kept(slots, tensors)

    def answer(self, rows: Tensor, counts: Tensor, experts: Experts, *, hidden: bool) -> tuple[Answer, Tensor | None]:
        """Run the bank on rows (M, *S) sorted by expert: its ``Answer``, and with ``hidden`` the hidden activations.

        Raises:
            UserError: ``hidden`` is wanted and the experts have no hidden layer.
        """
        return answer_of(experts, rows, counts, hidden=hidden)


def sort_slots(routing: Routing, num_experts: int, *, on_host: bool = False) -> SortedSlots:
    """Sort the filled slots by expert, in a stable order.

    Empty slots are cut off, for which the CPU waits for a GPU, unless the router says that all slots are filled and has
    no zero experts. Under ``torch.compile`` they stay at the end, so that shapes are static.

    Args:
        on_host: whether the counts are brought to the CPU as well, in the same wait.
    """
    flat = routing.indices.reshape(-1)
    key = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    order = key.argsort(stable=True)
    counts = count_slots(flat, num_experts)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    rows = order.shape[0]
    if on_host and not torch.compiler.is_compiling():
        counts = counts.cpu()
    if not (torch.compiler.is_compiling() or (routing.full and routing.num_experts <= num_experts)):
        rows = int(counts.sum())
        order, place = order[:rows], place.clamp_max(rows)
    return SortedSlots(order, place, counts, routing.indices.shape[1], rows == flat.shape[0])


def spread(x: Tensor, slots: SortedSlots) -> Tensor:
    """Copy the tokens x (N, *S) into rows (M, *S) sorted by expert: row r is the token of slot ``order[r]``.

    Under ``torch.compile`` rows of empty slots are 0: padding may hold nan, which parameters that experts share would
    take into their gradients.
    """
    return _filled(_Spread.apply(x, slots), slots)


def combine(result: Tensor | Answer, weights: Tensor, slots: SortedSlots) -> Tensor:
    """Add up the experts' outputs of each token, weighed by ``weights`` (N, K): (N, *S).

    It gathers by the inverse permutation instead of scattering, so that the sum has a fixed order on every device. The
    sum has the dtype of the weights, whatever dtype the experts return.

    Args:
        result: the rows (M, *S) that the bank returned, or its ``Answer``.
    """
    rows = result.y if isinstance(result, Answer) else result
    if isinstance(result, Answer) and result.gain is not None:
        weights = weights * _by_slot(result.gain[:, None].to(weights.dtype), slots).view_as(weights)
    if rows.dim() > 2:
        y: Tensor = combine(rows.flatten(1), weights, slots).unflatten(1, rows.shape[1:])
        return y
    return _Combine.apply(_filled(rows.to(weights.dtype), slots), weights, slots)  # type: ignore[no-any-return]


def _filled(rows: Tensor, slots: SortedSlots) -> Tensor:
    """``rows`` (M, *S), under ``torch.compile`` with 0 in those behind the last block: static shapes leave them."""
    if not torch.compiler.is_compiling():
        return rows
    tail = torch.arange(rows.shape[0], device=rows.device) >= slots.counts.sum()
    return rows.masked_fill(per_row(tail, rows), 0)


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

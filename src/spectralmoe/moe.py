"""MoE = router x dispatch x experts (+ shared expert), and what a layer must have to be recorded."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spectralmoe.dispatch import DISPATCHES, Dispatch, pick_dispatch
from spectralmoe.dispatch.base import SortedSlots, combine, sort_slots, spread
from spectralmoe.errors import UserError, one_of
from spectralmoe.experts import Experts
from spectralmoe.router import Router
from spectralmoe.routing import Routing
from spectralmoe.transforms import transforming

__all__ = ["Feed", "Kept", "MoE", "Recordable", "Sink"]


@dataclass(frozen=True, slots=True)
class Kept:
    """Tensors of one forward, sorted by expert, with the flat (token * K + slot) of each row."""

    slots: SortedSlots
    tensors: dict[str, Tensor]

    def only(self, names: tuple[str, ...]) -> Kept:
        """The same with the named tensors alone."""
        return Kept(self.slots, {name: self.tensors[name] for name in names})

    def filled(self, rows: Tensor) -> Tensor:
        """``rows`` without those of empty slots, which a compiled forward leaves at the end."""
        return rows[: int(self.slots.counts.sum())]


Entry = tuple[Routing, Kept | None, Tensor | None, bool]
"""Routing, kept tensors, tokens for streaming statistics, whether the layer and its router were training."""


@dataclass(slots=True)
class Sink:
    """Where a layer leaves its routings for one tape.

    A chain of pairs (entry, earlier entries): ``torch.compile`` traces the assignment without a look at what is there
    already (a list would give a new graph for each length; so would the earlier entries in front).
    """

    keep: tuple[str, ...] = ()
    training_only: bool = False
    attachment: Any = None  # what ``attach`` returned, in its own sink
    chain: tuple[Entry, Any] | None = None

    def entries(self) -> list[Entry]:
        """What was left here, in the order of the calls."""
        found, rest = [], self.chain
        while rest is not None:
            entry, rest = rest
            found.append(entry)
        return found[::-1]


@dataclass(slots=True, weakref_slot=True, eq=False)
class Feed:
    """Side information that ``feed`` leaves at a layer inside a model of others."""

    mask: Tensor | None = None
    context: dict[str, Any] | None = None
    replay: list[Routing] | None = None
    replayed: int = 0
    closed: bool = False

    def next_replay(self) -> Routing | None:
        """The recorded routing of this call of the layer; None without a replay."""
        if self.replay is None:
            return None
        if recomputing():
            if len(self.replay) > 1:
                raise UserError("feed(replay=...): a layer that is called several times cannot be recomputed")
            return self.replay[0]
        if self.replayed == len(self.replay):
            raise UserError(
                f"feed(replay=...): a layer is called more often than the {len(self.replay)} times recorded"
            )
        self.replayed += 1
        return self.replay[self.replayed - 1]


class Here(threading.local):
    """What a layer has for the calling thread alone: the sinks of the tapes that it opened, and its feed.

    Values are set in ``__init__``, which runs once a thread: ``torch.compile`` does not see a default of the class
    change. A copy starts empty.
    """

    def __init__(self) -> None:
        self.sinks: tuple[Sink, ...] = ()
        self.fed: Feed | None = None

    def __reduce__(self) -> tuple[type[Here], tuple[()]]:
        return Here, ()


class Recordable(nn.Module):
    """A layer that tapes can record and ``feed`` can reach. Forward reads what tape.py sets.

    Attributes:
        here: sinks and feed of the calling thread.
        watching: the sinks of tapes of training alone (``attach``, ``Monitor``), whatever thread it runs in.
        kept: what the last forward kept for its tapes.
        ended: the last feed whose block was closed, while its thread runs no other forward.
    """

    router: Router | None

    def __init__(self) -> None:
        super().__init__()
        self.router = None
        self.here = Here()
        self.watching: tuple[Sink, ...] = ()
        self.kept: frozenset[str] = frozenset()
        self.ended: weakref.ref[Feed] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy (an average of the weights, say) has no part in the tapes and feeds of its original."""
        return {**self.__dict__, "watching": (), "kept": frozenset(), "ended": None}

    @property
    def sinks(self) -> tuple[Sink, ...]:
        """Where the calling thread leaves its routings."""
        return (*self.watching, *self.here.sinks)

    def leave(self, routing: Routing, kept: Kept | None = None, tokens: Tensor | None = None) -> None:
        """Leave one routing in every sink, with what else belongs to it; a recomputation leaves nothing."""
        if not (sinks := self.sinks) or recomputing():
            return
        trains = self.training and (self.router is None or self.router.training)
        for sink in sinks:
            if self.training or not sink.training_only:
                own = kept.only(sink.keep) if kept is not None and sink.keep else None
                sink.chain = ((routing, own, tokens, trains), sink.chain)

    def names_to_keep(self) -> frozenset[str]:
        """What the tapes want kept; in a recomputation what its first forward kept, whose tape may be sealed by now."""
        if recomputing():
            return self.kept
        keep = frozenset(name for sink in self.sinks for name in sink.keep)
        if keep != self.kept and torch.is_grad_enabled():
            self.kept = keep
        return keep

    def take_feed(self, device: torch.device) -> Feed | None:
        """What ``feed`` left here for this thread, if its block is still open.

        A backward outside the block recomputes on an accelerator in a thread of autograd's own, which has no feed.
        """
        fed = self.here.fed
        if recomputing():
            if fed is None and self.ended is not None and device.type != "cpu":
                fed = self.ended()
            if fed is not None and fed.closed:
                raise UserError(
                    "a forward inside feed() is being recomputed after its block closed (activation checkpointing); "
                    "call backward inside the 'with feed(...)' block"
                )
            return fed
        if fed is None or not fed.closed:
            return fed
        self.here.fed = self.ended = None
        return None


def recomputing() -> bool:
    """Whether a backward pass is running, so that this forward is an activation checkpoint's second."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class MoE(Recordable):
    r"""Mixture-of-Experts layer: :math:`y_t = \sum_j w_{tj} E_{i_{tj}}(x_t) + S(x_t)`.

    Args:
        router: scorer and selector. It may count more experts than the bank has: those are zero experts.
        experts: the bank.
        dispatch: "auto" (``pick_dispatch``), "loop", "dense", "grouped", or a callable.
        shared: module applied to every token, added to the sum.

    Raises:
        UserError: unknown dispatch; fewer experts in the router than in the bank.

    >>> from spectralmoe import FeedForward, LinearScorer, TopK
    >>> layer = MoE(Router(LinearScorer(16, 4), TopK(2)), FeedForward(4, dim=16, hidden=32))
    >>> layer(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    router: Router

    def __init__(
        self, router: Router, experts: Experts, *, dispatch: str | Dispatch = "auto", shared: nn.Module | None = None
    ) -> None:
        super().__init__()
        if not isinstance(router, Router) or not isinstance(experts, Experts):
            raise UserError(f"MoE: takes a Router and Experts, got {type(router).__name__}, {type(experts).__name__}")
        if getattr(experts, "dim", router.scorer.dim) != router.scorer.dim:
            raise UserError(f"MoE: the router reads tokens of width D={router.scorer.dim}, the experts {experts.dim}")
        if isinstance(dispatch, str) and dispatch not in ("auto", *DISPATCHES):
            raise one_of("dispatch", dispatch, ["auto", *DISPATCHES])
        if router.num_experts < experts.num_experts:
            raise UserError(
                f"MoE: the router knows E={router.num_experts} experts, but the bank holds {experts.num_experts}"
            )
        self.router, self.experts, self.dispatch, self.shared = router, experts, dispatch, shared

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: dict[str, Any] | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """x (..., D) -> (..., D).

        Args:
            mask: (...), True for real tokens: the others get no expert, their output is 0, and so is their part
                in every gradient, whatever they hold.
            scale: a number that multiplies all that the layer adds; for the routed experts their N * K weights instead
                of N * D outputs.
        """
        fed, replay = self.take_feed(x.device), None
        if fed is not None:
            mask = fed.mask if mask is None else mask
            context = fed.context if context is None else context
            replay = fed.next_replay()
        routing = self.router(x, mask=mask, context=context, replay=replay)
        tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        trains = self.training and self.router.training
        seen = tokens.detach() if trains and self.router.scorer.streams_tokens else None
        if torch.is_autocast_enabled(x.device.type):
            tokens = tokens.to(torch.get_autocast_dtype(x.device.type))
        scaled = routing if scale is None else replace(routing, weights=_without(routing.weights * scale, routing.mask))
        y, kept = self._run(tokens, scaled)
        self.leave(routing, kept, seen)
        y = y if x.dim() == 2 else y.reshape(x.shape)
        if self.shared is None:
            return y
        shared: Tensor = self.shared(_without(x, mask))
        shared = shared if scale is None else shared * scale.to(shared.dtype)
        return y + _without(shared, mask)

    def _run(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Kept | None]:
        if keep := self.names_to_keep():
            return self._run_keeping(tokens, routing, keep)
        if isinstance(self.dispatch, str):
            dispatch = pick_dispatch(routing, self.experts) if self.dispatch == "auto" else DISPATCHES[self.dispatch]()
        else:
            dispatch = self.dispatch
        return dispatch(tokens, routing, self.experts), None

    def _run_keeping(self, tokens: Tensor, routing: Routing, keep: frozenset[str]) -> tuple[Tensor, Kept]:
        """The grouped dispatch, step by step, with its sorted tensors kept."""
        if transforming():
            raise UserError(
                "record(keep=...) cannot keep tensors inside a transform of torch.func; record without keep"
            )
        slots = sort_slots(routing, self.experts.num_experts)
        rows = spread(tokens, slots)
        hidden = self.experts.hidden(rows, slots.counts) if "hidden" in keep else None
        if "hidden" in keep and hidden is None:
            raise UserError(f"record(keep=...): {type(self.experts).__name__} has no 'hidden' to keep")
        result = self.experts(rows, slots.counts) if hidden is None else self.experts.project(hidden, slots.counts)
        tensors = {"input": rows} | ({} if hidden is None else {"hidden": hidden})
        tensors["output"] = result[0] * result[1][:, None] if isinstance(result, tuple) else result
        y = combine(result, routing.weights.to(tokens.dtype), slots)
        return y, Kept(slots, tensors)


def _without(values: Tensor, mask: Tensor | None) -> Tensor:
    """``values`` (..., D) with zeros where ``mask`` (...) has no real token, in value and gradient."""
    return values if mask is None else values.masked_fill(~mask.bool().unsqueeze(-1), 0)

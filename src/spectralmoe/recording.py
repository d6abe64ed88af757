"""Recordable: the base class of layers that ``record`` can record and ``feed`` can reach."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectralmoe.context import Context, Rows
from spectralmoe.dispatch.base import Kept
from spectralmoe.errors import UserError
from spectralmoe.parts import Part
from spectralmoe.router import Router
from spectralmoe.routing import Routing
from spectralmoe.torch_private import in_backward

__all__ = ["KEEPABLE", "Feed", "Recordable", "Sink", "recomputing"]

KEEPABLE = ("tokens", "input", "hidden", "output")
"""The names of the tensors that ``record`` can keep of any layer."""

Entry = tuple[Routing, Kept | None, Tensor | None, bool, Rows | None]
"""Routing, kept tensors, the tokens that the router read, whether layer and router were training, side information."""


@dataclass(slots=True)
class Sink:
    """Collects the routings of one layer for one tape.

    It is a chain of pairs (entry, earlier entries). ``torch.compile`` traces the assignment without reading what is
    there already; a list, or the earlier entries in front, would give a new graph for each length.
    """

    keep: tuple[str, ...] = ()
    training_only: bool = False
    attachment: Any = None  # what ``attach`` returned, in its own sink
    chain: tuple[Entry, Any] | None = None

    def entries(self) -> list[Entry]:
        """Return the entries in the order of the calls."""
        entries, rest = [], self.chain
        while rest is not None:
            entry, rest = rest
            entries.append(entry)
        return entries[::-1]


@dataclass(slots=True, weakref_slot=True, eq=False)
class Feed:
    """What ``feed`` hands to one layer: a mask, side information, and choices to replay."""

    mask: Tensor | None = None
    context: Context | Rows | None = None
    replay: list[Routing | Tensor] | None = None
    replayed: int = 0
    closed: bool = False

    def next_replay(self) -> Routing | Tensor | None:
        """Return the recorded routing or indices (N, K) for this call of the layer; None without a replay.

        Raises:
            UserError: the layer is called more often than it was recorded, or is recomputed although it is called
                several times.
        """
        if self.replay is None:
            return None
        if recomputing():
            if len(self.replay) > 1:
                raise UserError(
                    "feed(): a layer that is called several times cannot be recomputed with a replay; feed it "
                    "without one"
                )
            return self.replay[0]
        if self.replayed == len(self.replay):
            raise UserError(f"feed(): a layer is called more often than the {len(self.replay)} times recorded")
        self.replayed += 1
        return self.replay[self.replayed - 1]


class Here(threading.local):
    """The sinks and the feed of a layer that belong to the calling thread alone.

    Values are set in ``__init__``, which runs once a thread, because ``torch.compile`` does not see a default of the
    class change. A copy starts empty.
    """

    def __init__(self) -> None:
        self.sinks: tuple[Sink, ...] = ()
        self.fed: Feed | None = None

    def __reduce__(self) -> tuple[type[Here], tuple[()]]:
        return Here, ()


class Recordable(nn.Module):
    """The base class of layers that ``record`` can record and ``feed`` can reach: ``MoE`` and ``RankExperts``.

    Derive a layer of your own from it to have it recorded. Its ``forward`` calls ``begin`` first and ``leave`` with
    its routing, as ``MoE.forward`` does, and its constructor sets ``router``.

    Attributes:
        router: the layer's router, or None.
        here: the sinks (where routings are left for a tape) and the feed of the calling thread.
        watching: the sinks of ``attach`` and ``Monitor``, which record training in every thread.
        kept: the names of the tensors that the last forward kept for its tapes.
        ended: the last feed whose block was closed, until its thread runs another forward.
    """

    router: Router | None

    def __init__(self) -> None:
        super().__init__()
        self.router = None
        self.without_tapes()

    def without_tapes(self) -> None:
        """Set the attributes that tapes and ``feed`` use to their empty state."""
        self.here = Here()
        self.watching: tuple[Sink, ...] = ()
        self.kept: frozenset[str] = frozenset()
        self.ended: weakref.ref[Feed] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without tapes and feeds (an average of the weights, for example)."""
        return {**self.__dict__, "watching": (), "kept": frozenset(), "ended": None}

    @property
    def keepable(self) -> tuple[str, ...]:
        """The names of the tensors that ``record`` can keep of this layer."""
        return KEEPABLE

    def layer_path(self, path: str) -> str:
        """Return the path of the MoE layer, given that of this module, which may be a part of the layer."""
        return path

    def watched(self, model: nn.Module, path: str) -> Any:
        """Return the ``Watched`` through which ``Inspector`` reads this layer of ``model``; None if it cannot."""
        return None

    @property
    def matrix(self) -> Tensor | None:
        """The scorer's routing matrix; None if there is none."""
        return None if self.router is None else self.router.scorer.matrix

    @property
    def trains_router(self) -> bool:
        """Whether a forward trains the router: the layer is in training mode, and the router is not frozen."""
        return self.training and self.router is not None and any(p.requires_grad for p in self.router.parameters())

    @property
    def sinks(self) -> tuple[Sink, ...]:
        """The sinks in which a forward of the calling thread leaves its routing."""
        return (*self.watching, *self.here.sinks)

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Iterate over scorer, selector, experts and the parts inside them by name, without those of inner layers."""
        inside: list[tuple[str, nn.Module]] = list(self.named_children())[::-1]
        met: set[nn.Module] = set()
        while inside:
            name, module = inside.pop()
            if isinstance(module, Part) and module not in met:
                yield name, module
            met.add(module)
            if not isinstance(module, Recordable):
                inside += [(f"{name}.{child}", value) for child, value in module.named_children()][::-1]

    def begin(
        self, x: Tensor, mask: Tensor | None, context: Context | Rows | None
    ) -> tuple[Tensor | None, Context | Rows | None, Routing | Tensor | None]:
        """Return mask, side information and replay for a forward on ``x``: what it was given, else what is fed.

        Raises:
            UserError: as ``take_feed`` and ``Feed.next_replay``.
        """
        fed = self.take_feed(x.device)
        if fed is None:
            return mask, context, None
        mask = fed.mask if mask is None else mask
        context = fed.context if context is None else context
        return mask, context, fed.next_replay()

    def leave(
        self, routing: Routing, kept: Kept | None = None, tokens: Tensor | None = None, context: Rows | None = None
    ) -> None:
        """Leave one routing, and what is kept with it, for every open tape; a recomputation leaves nothing."""
        if not (sinks := self.sinks) or recomputing():
            return
        trains = self.training and (self.router is None or self.router.training)
        for sink in sinks:
            if self.training or not sink.training_only:
                asked = kept.only(sink.keep) if kept is not None and sink.keep else None
                rows = None if sink.training_only else context  # such tapes last: they hold what they need alone
                sink.chain = ((routing, asked, tokens, trains, rows), sink.chain)

    def names_to_keep(self) -> frozenset[str]:
        """Return the names of the tensors that open tapes ask for.

        While a checkpoint recomputes a forward, these are the names that the first forward kept, because the tape may
        be closed by then.
        """
        if recomputing():
            return self.kept
        keep = frozenset(name for sink in self.sinks for name in sink.keep)
        if keep != self.kept and torch.is_grad_enabled():
            self.kept = keep
        return keep

    def seen(self, queries: Tensor, names: frozenset[str], *, streams: bool) -> Tensor | None:
        """Return the tokens (N, D) for the record; None if nothing asks for them. If a tape does, it is a copy.

        Args:
            queries: what the router reads (..., D).
            names: the names of the tensors to keep.
            streams: whether a part of the layer needs the tokens of training for its statistics.
        """
        if "tokens" in names:
            queries = queries.clone()
        elif streams and self.training and (self.router is None or self.router.training):
            queries = queries.detach()
        else:
            return None
        return queries.reshape(-1, queries.shape[-1])

    def take_feed(self, device: torch.device) -> Feed | None:
        """Return what ``feed`` hands to this layer in this thread, if its block is still open.

        Raises:
            UserError: a forward is recomputed after its block was closed.
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
    """Return whether a backward pass is running, so that this forward is the second one of an activation checkpoint."""
    return not torch.compiler.is_compiling() and in_backward()

"""What a layer must have to be recorded: sinks that open tapes put there, and the side information of ``feed``."""

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
"""What ``record`` can keep of any layer."""

Entry = tuple[Routing, Kept | None, Tensor | None, bool, Rows | None]
"""Routing, kept tensors, the tokens that the router read, whether layer and router were training, side information."""


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
        entries, rest = [], self.chain
        while rest is not None:
            entry, rest = rest
            entries.append(entry)
        return entries[::-1]


@dataclass(slots=True, weakref_slot=True, eq=False)
class Feed:
    """Side information that ``feed`` leaves at a layer inside a model of others."""

    mask: Tensor | None = None
    context: Context | Rows | None = None
    replay: list[Routing | Tensor] | None = None
    replayed: int = 0
    closed: bool = False

    def next_replay(self) -> Routing | Tensor | None:
        """The recorded routing or indices (N, K) of this call of the layer; None without a replay."""
        if self.replay is None:
            return None
        if recomputing():
            if len(self.replay) > 1:
                raise UserError("feed(): a layer that is called several times cannot be recomputed with a replay")
            return self.replay[0]
        if self.replayed == len(self.replay):
            raise UserError(f"feed(): a layer is called more often than the {len(self.replay)} times recorded")
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
        self.without_tapes()

    def without_tapes(self) -> None:
        """Set what tapes and ``feed`` use: there is none yet."""
        self.here = Here()
        self.watching: tuple[Sink, ...] = ()
        self.kept: frozenset[str] = frozenset()
        self.ended: weakref.ref[Feed] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without tapes and feeds (an average of the weights, for example)."""
        return {**self.__dict__, "watching": (), "kept": frozenset(), "ended": None}

    @property
    def keepable(self) -> tuple[str, ...]:
        """The names of what ``record`` can keep of this layer."""
        return KEEPABLE

    def layer_path(self, path: str) -> str:
        """The path of the MoE layer: of this module, whose own path is given, or of the one that it is a part of."""
        return path

    def watched(self, model: nn.Module, path: str) -> Any:
        """What the instruments see of it in ``model``, where it is at ``path``: a ``Watched``; None: nothing."""
        return None

    @property
    def matrix(self) -> Tensor | None:
        """The routing matrix, as the router has it now; None where there is none."""
        return None if self.router is None else self.router.scorer.matrix

    @property
    def trains_router(self) -> bool:
        """Whether a forward trains the router: not in evaluation mode, nor where it is frozen."""
        return self.training and self.router is not None and any(p.requires_grad for p in self.router.parameters())

    @property
    def sinks(self) -> tuple[Sink, ...]:
        """Where the calling thread leaves its routings."""
        return (*self.watching, *self.here.sinks)

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Scorer, selector, bank and the parts inside them by name, but for those of other layers inside."""
        inside: list[tuple[str, nn.Module]] = list(self.named_children())[::-1]
        met: set[nn.Module] = set()
        while inside:
            name, module = inside.pop()
            if isinstance(module, Part) and module not in met:
                yield name, module
            met.add(module)
            if not isinstance(module, Recordable):
                inside += [(f"{name}.{child}", value) for child, value in module.named_children()][::-1]

    def leave(
        self, routing: Routing, kept: Kept | None = None, tokens: Tensor | None = None, context: Rows | None = None
    ) -> None:
        """Leave one routing in every sink, with what else belongs to it; a recomputation leaves nothing."""
        if not (sinks := self.sinks) or recomputing():
            return
        trains = self.training and (self.router is None or self.router.training)
        for sink in sinks:
            if self.training or not sink.training_only:
                asked = kept.only(sink.keep) if kept is not None and sink.keep else None
                rows = None if sink.training_only else context  # such tapes last: they hold what they need alone
                sink.chain = ((routing, asked, tokens, trains, rows), sink.chain)

    def names_to_keep(self) -> frozenset[str]:
        """The names of tensors that open tapes ask for.

        While a checkpoint recomputes, those that its first forward kept: the tape may be closed by then.
        """
        if recomputing():
            return self.kept
        keep = frozenset(name for sink in self.sinks for name in sink.keep)
        if keep != self.kept and torch.is_grad_enabled():
            self.kept = keep
        return keep

    def seen(self, queries: Tensor, names: frozenset[str], *, streams: bool) -> Tensor | None:
        """What the records get of what the router read, rows (N, D); a copy where a tape asks, which may be read later.

        Args:
            names: of tensors to keep.
            streams: whether a part keeps statistics of the tokens of training.
        """
        if "tokens" in names:
            queries = queries.clone()
        elif streams and self.training and (self.router is None or self.router.training):
            queries = queries.detach()
        else:
            return None
        return queries.reshape(-1, queries.shape[-1])

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
    return not torch.compiler.is_compiling() and in_backward()

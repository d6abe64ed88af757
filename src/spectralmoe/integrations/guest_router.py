"""A router of this library whose experts, and everything around them, belong to another framework."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectralmoe.context import rows_of
from spectralmoe.diagnostics.watch import OwnLayer, layer_number
from spectralmoe.errors import UserError
from spectralmoe.layers import layer_name
from spectralmoe.naming import Table, shown
from spectralmoe.presets import Preset, find_preset
from spectralmoe.recording import Recordable
from spectralmoe.router import Router
from spectralmoe.tape import Record

__all__ = ["GuestLayer", "GuestRouter", "read_router_row"]


class GuestRouter(Recordable):
    """What the routers in other frameworks share: one decision, with its side information, for tapes and terms.

    ``record``, ``feed``, ``Monitor`` and ``attach`` find it under the name of the layer that it is a part of.
    """

    router: Router

    @property
    def keepable(self) -> tuple[str, ...]:
        """What the router reads; the experts are the framework's own."""
        return ("tokens",)

    def layer_path(self, path: str) -> str:
        """The path of the layer that this router is a part of."""
        return path.rpartition(".")[0]

    def watched(self, model: nn.Module, path: str) -> GuestLayer:
        """The layer for the instruments, as far as its router goes."""
        return GuestLayer(self.layer_path(layer_name(path)), self)

    def decide(self, tokens: Tensor, mask: Tensor | None = None, *, keep: tuple[str, ...] = ()) -> Record:
        """Route tokens (..., D). The caller leaves the record for the tapes, when it has accepted it.

        Args:
            mask: (...) bool, True for a real token; that of ``feed`` comes before it.
            keep: names that the record holds beside what tapes ask for.
        """
        fed, replay, context = self.take_feed(tokens.device), None, None
        if fed is not None:
            mask, replay = mask if fed.mask is None else fed.mask, fed.next_replay()
            context = rows_of(fed.context, tokens, mask)
        routing = self.router(tokens, mask=mask, context=context, replay=replay)
        seen = self.seen(tokens, self.names_to_keep().union(keep), streams=self.router.scorer.streams_tokens)
        return Record("", self, routing, None, seen, self.training, context)

    def leave_record(self, record: Record) -> None:
        """Leave the record in every open tape."""
        self.leave(record.routing, None, record.tokens, record.context)


class GuestLayer(OwnLayer):
    """The layer around a ``GuestRouter`` for the instruments: its experts cannot be run by themselves."""

    layer: GuestRouter  # type: ignore[assignment]

    def __init__(self, name: str, layer: GuestRouter) -> None:
        self.name, self.number, self.layer = name, layer_number(name) or 0, layer
        self.num_experts = layer.router.num_experts
        self.top_k = layer.router.k

    def expert(self, x: Tensor, e: int) -> Tensor:
        """Refused."""
        raise UserError(f"the experts of layer {self.name!r} are another framework's, which runs them itself")

    def expert_weights(self, e: int) -> Tensor:
        """None that are known here."""
        return torch.empty(0)


def read_router_row(row: str | Table, framework: str) -> Preset:
    """The row, as ``find_preset`` reads it.

    Raises:
        UserError: as ``find_preset``; a row with experts or an optimizer of its own, or without a choice ("dense").

    >>> read_router_row("sr-moe", "Megatron").scorer["type"]
    'prototype'
    >>> read_router_row("mpoe", "Megatron")
    Traceback (most recent call last):
    spectralmoe.errors.UserError: router 'mpoe' asks for experts 'mpo', but experts and optimizer are Megatron's own
    """
    preset = find_preset(row)
    parts = {"experts": preset.experts, "optimizer": preset.optimizer}
    asked = [f"{kind} {part['type']!r}" for kind, part in parts.items() if part is not None]
    asked += ["one dense expert"] if preset.dense else []
    if asked:
        raise UserError(f"router {shown(row)!r} asks for {asked[0]}, but experts and optimizer are {framework}'s own")
    return preset

"""What a row asks of a framework that brings experts, optimizer and dispatch of its own: a router and its terms."""

from __future__ import annotations

from spectralmoe.errors import UserError
from spectralmoe.naming import Table, shown
from spectralmoe.presets import Preset, find_preset

__all__ = ["read_router_row"]


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

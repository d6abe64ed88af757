"""Edits: a copy of a model in which some MoE layers have other routers, banks and placements."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from spectralmoe.errors import UserError, one_of
from spectralmoe.experts import Experts
from spectralmoe.layers import moe_layers, unwrapped
from spectralmoe.moe import MoE
from spectralmoe.placement import Placement
from spectralmoe.router import Router
from spectralmoe.sharding import is_sharded

__all__ = ["edited", "layers_of", "rebuilt", "whole_number"]

Model = TypeVar("Model", bound=nn.Module)


def layers_of(owner: str, model: nn.Module) -> dict[str, MoE]:
    """The MoE layers of ``model`` that are this library's.

    Raises:
        UserError: there is none; one is sharded.
    """
    layers = {name: layer for name, layer in moe_layers(model).items() if isinstance(layer, MoE)}
    if not layers:
        raise UserError(f"{owner}: {type(unwrapped(model)).__name__} holds no MoE of this library")
    for name, layer in layers.items():
        if any(is_sharded(parameter) for parameter in layer.parameters()):
            raise UserError(f"{owner}: layer {name!r} is sharded; {owner} the whole model and shard it afterwards")
    return layers


def edited(
    owner: str, model: Model, layers: Mapping[str, MoE], wish: Any, edit: Callable[[str, MoE, Any], MoE]
) -> Model:
    """A copy of ``model`` with ``edit(name, layer, wish)`` in the place of its layers; the model stays as it is.

    Args:
        wish: what to do with every layer, or layer name -> what to do; layers without a name there are copied as they
            are. What is not a number speaks of certain experts, so it needs a name where there are several layers.

    Raises:
        UserError: an unknown layer; certain experts of several layers.
    """
    if not isinstance(wish, Mapping):
        if not isinstance(wish, int) and len(layers) > 1:
            raise UserError(
                f"{owner}: the model has {len(layers)} MoE layers, each with experts of its own; give a number, or a "
                f"dict with the layers' names: {', '.join(layers)}"
            )
        wish = dict.fromkeys(layers, wish)
    for name in wish:
        if name not in layers:
            raise one_of(f"layer of {owner}", name, layers)
    memo: dict[int, Any] = {id(layers[name]): edit(name, layers[name], value) for name, value in wish.items()}
    return copy.deepcopy(unwrapped(model), memo)  # type: ignore[return-value]


def rebuilt(layer: MoE, experts: Experts, table: Sequence[Sequence[int]], router: Router | None = None) -> MoE:
    """A copy of ``layer`` with another bank, in which expert e of the router has the places ``table[e]``.

    Args:
        router: None: a copy of the layer's router.
    """
    memo: dict[int, Any] = {id(layer.experts): experts, id(layer.placement): None}
    fresh = copy.deepcopy(layer, memo if router is None else memo | {id(layer.router): router})
    plain = [[e] if e < experts.num_experts else [] for e in range(len(table))]
    fresh.placement = None
    if list(table) != plain:
        device = next((tensor.device for tensor in experts.parameters()), None)
        fresh.placement = Placement(table).to(device)
    fresh.router.scorer.meet(experts)
    return fresh


def whole_number(owner: str, what: str, value: int, least: int, most: int) -> int:
    """``value``, if it lies between ``least`` and ``most``.

    Raises:
        UserError: it does not, or is no whole number.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(f"{owner}: {what} must be a whole number from {least} to {most}, got {value}")
    return value

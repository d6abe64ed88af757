"""Functions that copy a model and change the routers, experts and placements of some MoE layers in the copy."""

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
    """Return the ``MoE`` layers of ``model`` by name.

    Args:
        owner: the name of the calling function, for error messages.

    Raises:
        UserError: there is none, or one is sharded.
    """
    layers = {name: layer for name, layer in moe_layers(model).items() if isinstance(layer, MoE)}
    if not layers:
        raise UserError(
            f"{owner}: {type(unwrapped(model)).__name__} holds no MoE of this library; for Hugging Face models see "
            "spectralmoe.hf"
        )
    for name, layer in layers.items():
        if any(is_sharded(parameter) for parameter in layer.parameters()):
            raise UserError(f"{owner}: layer {name!r} is sharded; {owner} the whole model and shard it afterwards")
    return layers


def edited(
    owner: str, model: Model, layers: Mapping[str, MoE], wish: Any, edit: Callable[[str, MoE, Any], MoE]
) -> Model:
    """Return a copy of ``model`` whose layers are ``edit(name, layer, wish)``; the model stays as it is.

    Args:
        owner: the name of the calling function, for error messages.
        layers: the MoE layers of the model by name.
        wish: what ``edit`` is told: one value for all layers, or layer name -> value; other layers are copied as they
            are. A list of experts belongs to one layer, so with several layers it needs a name.
        edit: the function that makes the new layer.

    Raises:
        UserError: a layer is unknown, or a list of experts is given for several layers.
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
    """Return a copy of ``layer`` with other experts; expert e of the router has the places ``table[e]`` of the bank.

    Args:
        router: the new router; None copies the layer's.
    """
    memo: dict[int, Any] = {id(layer.experts): experts, id(layer.placement): None}
    fresh = copy.deepcopy(layer, memo if router is None else memo | {id(layer.router): router})
    plain = [[e] if e < experts.num_experts else [] for e in range(len(table))]
    fresh.placement = None
    if list(table) != plain:
        device = next((tensor.device for tensor in experts.parameters()), None)
        fresh.placement = Placement(table).to(device)
    fresh.router.scorer.bind_experts(experts)
    return fresh


def whole_number(owner: str, what: str, value: int, least: int, most: int) -> int:
    """Return ``value`` if it is a whole number from ``least`` to ``most``.

    Raises:
        UserError: it is not; the message names ``owner`` and ``what``.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(f"{owner}: {what} must be a whole number from {least} to {most}, got {value}")
    return value

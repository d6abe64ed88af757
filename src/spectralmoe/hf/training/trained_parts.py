"""Which parts of a Hugging Face MoE a training changes: routers, experts, or all, of all MoE layers or of the last."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from spectralmoe.errors import UserError, one_of
from spectralmoe.hf.layer import HFLayer
from spectralmoe.hf.layers import find_layers

__all__ = ["chosen_layers", "decoder_layers", "train_only"]

_LAST = re.compile(r"last(\d+)")


def chosen_layers(model: nn.Module, layers: str) -> list[HFLayer]:
    """The MoE layers that ``layers`` names: "all", or the last N of them, "last2".

    Raises:
        UserError: something else; more layers than there are; no MoE layer.
    """
    every = find_layers(model)
    if layers == "all":
        return every
    match = _LAST.fullmatch(layers)
    if match is None:
        raise one_of("layers", layers, ["all", "last1", "last2"])
    if not 0 < int(match[1]) <= len(every):
        raise UserError(f"layers {layers!r}: the model has {len(every)} MoE layers; name at most as many")
    return every[-int(match[1]) :]


def decoder_layers(model: nn.Module, layer: HFLayer) -> tuple[nn.ModuleList, int]:
    """The list of decoder layers that a MoE layer stands in, and its place there.

    Raises:
        UserError: it stands in no numbered list.
    """
    match = re.match(r"(.*?)\.(\d+)\.", f"{layer.path}.")
    stack = model.get_submodule(match[1]) if match else None
    if match is None or not isinstance(stack, nn.ModuleList):
        raise UserError(f"{layer.name} stands in no list of layers")
    return stack, int(match[2])


def train_only(model: nn.Module, parts: Sequence[str], layers: str) -> None:
    """Let only ``parts`` of the MoE layers that ``layers`` names take gradients.

    Args:
        parts: "routers"; "experts": those and what the layer has beside them, such as a shared expert; "all": the
            decoder layers whole, and where ``layers`` is "all" the rest of the model too.

    Raises:
        UserError: as ``chosen_layers``.
    """
    model.requires_grad_("all" in parts and layers == "all")
    for layer in chosen_layers(model, layers):
        if "all" in parts:
            stack, place = decoder_layers(model, layer)
            stack[place].requires_grad_(True)
        if "experts" in parts:
            layer.layer.requires_grad_(True)
            layer.router.requires_grad_("routers" in parts)
        if "routers" in parts:
            layer.router.requires_grad_(True)

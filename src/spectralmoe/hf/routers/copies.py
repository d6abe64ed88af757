"""Copies of experts in a swapped layer: places behind the stacked experts, among which its router deals tokens out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from spectralmoe.errors import UserError, refuse_differences
from spectralmoe.hf.layer import HFLayer
from spectralmoe.hf.layers import find_layers
from spectralmoe.hf.routers.rules import Rule
from spectralmoe.hf.routers.swapped import SwappedRouter
from spectralmoe.hf.structure import count_attributes
from spectralmoe.placement import Placement, check_places

__all__ = ["add_copies", "copies_of", "placed_layers", "refuse_copies", "refuse_plain_saving", "without_copies"]


def refuse_copies(owner: str, layer: HFLayer, rule: Rule) -> None:
    """Refuse a layer whose experts are not told, slot by slot, which of a stack they are.

    Raises:
        UserError: it is one.
    """
    if isinstance(layer.experts, nn.ModuleList | nn.ModuleDict) or "indices" not in rule.roles:
        raise UserError(
            f"{owner}: {layer.name} ({type(layer.layer).__name__}) does not call stacked experts by their index, so "
            "copies cannot take turns there; with copies=0 experts are quantised alone"
        )


@torch.no_grad()
def add_copies(layer: HFLayer, placement: Placement, copies: Mapping[str, Tensor]) -> None:
    """Put ``copies``, name -> (C, ...), behind the stacks of a swapped layer, and have its router use them.

    Raises:
        UserError: a placement of another number of experts; copies of other tensors or shapes, or not as many.
    """
    stacks, router, before = layer.stacks(), layer.router, layer.num_experts
    assert isinstance(router, SwappedRouter)
    check_places(placement, before, placement.num_places)
    wanted = {name: (placement.num_places - before, *stack.shape[1:]) for name, stack in stacks.items()}
    refuse_differences(f"copies of {layer.name} do not fit", wanted, {n: tuple(c.shape) for n, c in copies.items()})
    for name, stack in stacks.items():
        owner, _, attribute = name.rpartition(".")
        grown = torch.cat([stack.detach(), copies[name].to(stack)])
        setattr(layer.experts.get_submodule(owner), attribute, nn.Parameter(grown, stack.requires_grad))
    for name in count_attributes(layer.experts, before):
        setattr(layer.experts, name, placement.num_places)
    router.placement = placement.to(next(layer.experts.parameters()).device)


def refuse_plain_saving(model: Any) -> None:
    """Have this model, which holds copies, refuse ``save_pretrained``, whose folder would not load."""
    model.save_pretrained = _refuse_saving


def _refuse_saving(*_: Any, **__: Any) -> NoReturn:
    raise UserError(
        "save_pretrained: the model holds copies of experts, which its config does not count, so that nothing could "
        "load the folder; use save_swapped(model, folder), which writes a stock model with the copies beside it"
    )


def placed_layers(model: nn.Module) -> dict[str, HFLayer]:
    """The layers of ``model`` with copies, by name."""
    if not any(isinstance(each, SwappedRouter) and each.placement is not None for each in model.modules()):
        return {}  # without a look at the layers, which may be sharded
    return {one.name: one for one in find_layers(model) if getattr(one.router, "placement", None) is not None}


def copies_of(layer: HFLayer) -> dict[str, Tensor]:
    """The entries of its stacks that are copies (C, ...), by name."""
    return {name: stack.detach()[layer.num_experts :] for name, stack in layer.stacks().items()}


def without_copies(layer: HFLayer) -> dict[str, Tensor]:
    """Its stacks without copies, by their names in the model."""
    start = f"{layer.path}.experts".removeprefix(".")
    return {f"{start}.{name}": stack.detach()[: layer.num_experts] for name, stack in layer.stacks().items()}

"""Functions that find the MoE layers of a model and their names, whatever wraps the model; names of parts."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from spectralmoe.errors import UserError
from spectralmoe.recording import Recordable

__all__ = ["below", "layer_name", "moe_layers", "plain_name", "stock_experts", "unwrapped"]

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def moe_layers(model: nn.Module) -> dict[str, Recordable]:
    """Return the MoE layers of ``model`` by name, without the prefixes of wrappers such as DDP.

    Raises:
        UserError: there is none.

    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK
    >>> model = nn.Sequential(nn.Linear(8, 8), MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 16)))
    >>> list(moe_layers(nn.ModuleDict({"block": model})))
    ['block.1']
    """
    inside = unwrapped(model)
    layers = {
        module.layer_path(layer_name(path)): module
        for path, module in inside.named_modules()
        if isinstance(module, Recordable) and "original_module" not in path.split(".")  # PEFT's dead copy
    }
    if not layers and stock_experts(inside):
        raise UserError(
            f"{type(inside).__name__} has stock routers, which can be read by record(model) and no more: first put "
            "routers of this library in, with spectralmoe.hf.swap_routers(model)"
        )
    if not layers:
        raise UserError(f"{type(inside).__name__} holds no MoE layer; put one in, or pass the model that holds it")
    return layers


def stock_experts(model: nn.Module) -> bool:
    """Return whether ``model`` holds experts (a child called "experts") without a layer or router of this library."""
    if isinstance(model, Recordable):
        return False
    children = dict(model.named_children())
    if "experts" in children and not any(isinstance(module, Recordable) for module in model.modules()):
        return True
    return any(stock_experts(child) for child in children.values())


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's module inside DDP, DataParallel, ``torch.compile`` and activation checkpoints."""
    names = ("module",) if isinstance(model, DistributedDataParallel | DataParallel | AveragedModel) else _WRAPPERS
    inside = [child for name, child in model.named_children() if name in names]
    return unwrapped(inside[0]) if inside else model


def plain_name(path: str) -> str:
    """Return the path of a module or parameter without the parts that wrappers add."""
    return ".".join(part for part in path.split(".") if part and part not in _WRAPPERS)


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with ``prefix``, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def layer_name(path: str) -> str:
    """Return the name of a layer: its path without the parts that wrappers and PEFT add.

    >>> layer_name("base_model.model.model.layers.0.mlp.gate.modules_to_save.default")
    'model.layers.0.mlp.gate'
    """
    parts = plain_name(path).removeprefix("base_model.model.").split(".")
    while "modules_to_save" in parts:
        place = parts.index("modules_to_save")
        del parts[place : place + 2]
    return ".".join(parts)

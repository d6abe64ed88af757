"""The blocks of a vision model: where they are, how wide, and how their output is laid out.

By the names that timm's families share, without importing timm: ``blocks`` (ViT, Eva, BEiT, Hiera, ...),
``layers.S.blocks`` (Swin), ``stages.S.blocks`` (ConvNeXt, PVT, ...); those of other libraries have ``layers`` or
``layer`` in an encoder.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import nn

from spectralmoe.errors import UserError
from spectralmoe.experts import FeedForward

__all__ = ["block_width", "choose_blocks", "is_channels_first", "model_blocks", "prefix_tokens"]

_CONTAINERS = ("blocks", "layers", "stages", "layer")
_LISTED = 3
_CLASS_ATTENTION = ("blocks_token_only", "cls_attn_blocks")


def model_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """All blocks of ``model`` by their path, in the order in which they run.

    Raises:
        UserError: it holds none itself; says which part of it does.
    """
    for name in _CONTAINERS:
        inside = getattr(model, name, None)
        if isinstance(inside, nn.Sequential | nn.ModuleList) and len(inside):
            return dict(_flat(name, inside))
    looked = f"looked for .{', .'.join(_CONTAINERS)}"
    if not (below := _containers_below(model)):
        raise UserError(f"{type(model).__name__} has no blocks: {looked}, in it and in its parts")
    there = [f"model.{path} has {len(inside)} x {type(next(iter(inside))).__name__}" for path, inside in below.items()]
    parts = " or ".join(dict.fromkeys(f"model.{path.rpartition('.')[0]}" for path in list(below)[:_LISTED]))
    raise UserError(
        f"{type(model).__name__} has no blocks of its own ({looked}), but {', '.join(there[:_LISTED])}: pass {parts}"
    )


def choose_blocks(model: nn.Module, which: str | Sequence[int]) -> dict[str, nn.Module]:
    """The chosen blocks of ``model`` by their path, in the order in which they run.

    Args:
        which: "all", "lastN" ("last6"), indices with commas ("1,3") or a list of indices; negative ones count from
            the end. Blocks are counted through all stages.

    Raises:
        UserError: a model without blocks; a choice that cannot be read, is empty or out of range.

    >>> model = nn.Module()
    >>> model.blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    >>> list(choose_blocks(model, "last2")), list(choose_blocks(model, [0, -1]))
    (['blocks.1', 'blocks.2'], ['blocks.0', 'blocks.2'])
    """
    blocks = list(model_blocks(model).items())
    chosen = _indices(which, len(blocks))
    if not chosen or not all(-len(blocks) <= index < len(blocks) for index in chosen):
        raise UserError(f"blocks={which!r} is out of range: {type(model).__name__} has {len(blocks)} blocks, from 0")
    return dict(blocks[index] for index in sorted({index % len(blocks) for index in chosen}))


def block_width(path: str, block: nn.Module) -> int:
    """D, the width of the block's output: that of the last layer of its MLP (of the block, where it has none).

    Raises:
        UserError: there is no such layer.
    """
    inside = getattr(block, "mlp", block)
    for module in reversed(list(inside.modules())):
        if isinstance(module, nn.Linear):
            return module.out_features
        if isinstance(module, nn.Conv2d):
            return module.out_channels
        if isinstance(module, FeedForward):
            return module.dim
    kinds = dict.fromkeys(
        type(module).__name__ for module in inside.modules() if next(module.parameters(False), None) is not None
    )
    there = f"only {', '.join(list(kinds)[:_LISTED])}" if kinds else "no weights at all"
    raise UserError(
        f"cannot tell the width of block {path!r} ({type(block).__name__}): it holds {there}, not one nn.Linear, "
        "nn.Conv2d or FeedForward; where this is no whole block, pass the part of the model that holds the blocks"
    )


def is_channels_first(block: nn.Module, width: int) -> bool | None:
    """Whether the block gives (B, D, H, W) rather than (B, H, W, D) or sequences; None where that cannot be told.

    It is the layout that a copy of the block on the meta device, which computes nothing, takes and gives. If it takes
    both or neither, a block with convolutions of its own and no attention, as in ConvNeXt, has channels first.
    """
    h, w = [size for size in (8, 16, 4) if size != width][:2]
    first, last = _gives(block, (1, width, h, w), 1), _gives(block, (1, h, w, width), -1)
    if first != last:
        return first
    convolves = not hasattr(block, "attn") and any(isinstance(child, nn.Conv2d) for child in block.children())
    return True if convolves else None


def prefix_tokens(model: nn.Module) -> int:
    """Number of class, distillation and register tokens in front of the patches that the blocks see.

    CaiT and XCiT bring their class token in behind these blocks.
    """
    if any(hasattr(model, name) for name in _CLASS_ATTENTION):
        return 0
    return int(getattr(model, "num_prefix_tokens", 0))


def _containers_below(model: nn.Module) -> dict[str, nn.Sequential | nn.ModuleList]:
    """The outermost lists of blocks in the parts of ``model``, by path, the longest first."""
    containers: dict[str, nn.Sequential | nn.ModuleList] = {}
    for path, module in model.named_modules():
        inner = any(path.startswith(f"{outer}.") for outer in containers)
        named = path.rpartition(".")[2] in _CONTAINERS and isinstance(module, nn.Sequential | nn.ModuleList)
        if named and not inner and any(isinstance(part, nn.Linear) for part in module.modules()):
            containers[path] = cast("nn.Sequential | nn.ModuleList", module)
    return dict(sorted(containers.items(), key=lambda item: -len(item[1])))


@torch.no_grad()
def _gives(block: nn.Module, shape: tuple[int, ...], axis: int) -> bool:
    """Whether ``block`` makes of an x of this shape a tensor of four dimensions that is as wide in ``axis``."""
    tensors = [*block.parameters(), *block.buffers()]
    try:
        block = copy.deepcopy(block, {id(tensor): tensor.to("meta") for tensor in tensors}).eval()
        for module in block.modules():  # those that watch the model are not part of it
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        y = block(torch.empty(shape, dtype=tensors[0].dtype, device="meta"))
        y = y[0] if isinstance(y, tuple) else y
        return bool(y.dim() == len(shape) and y.shape[axis] == shape[axis])
    except Exception:  # whatever the block's own code says to another layout
        return False


def _flat(path: str, module: nn.Module, *, top: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """The blocks below a container: through nested containers and stages that hold ``blocks``.

    A ``Sequential`` of single layers inside a container is a block.
    """
    layers = isinstance(module, nn.Sequential) and any(not list(child.children()) for child in module)
    if isinstance(module, nn.Sequential | nn.ModuleList) and (top or not layers):
        for name, child in module.named_children():
            yield from _flat(f"{path}.{name}", child, top=False)
    elif isinstance(inside := getattr(module, "blocks", None), nn.Sequential | nn.ModuleList):
        yield from _flat(f"{path}.blocks", inside)
    else:
        yield path, module


def _indices(which: str | Sequence[int], depth: int) -> list[int]:
    if isinstance(which, Sequence) and not isinstance(which, str):
        indices = list(which)
    elif not isinstance(which, str):
        raise UserError(f'blocks={which!r} cannot be read; write "all", "last6", "1,3" or a list of indices')
    elif which == "all":
        indices = list(range(depth))
    elif last := re.fullmatch(r"last(\d+)", which):
        indices = list(range(-min(int(last[1]), depth + 1), 0))  # one too many is an error of its own
    elif re.fullmatch(r"\s*-?\d+\s*(,\s*-?\d+\s*)*", which):
        indices = [int(index) for index in which.split(",")]
    else:
        raise UserError(f'blocks={which!r} cannot be read; write "all", "last6", "1,3" or a list of indices')
    if not all(type(index) is int for index in indices):
        raise UserError(f"blocks={which!r} holds something that is not an index")
    return indices

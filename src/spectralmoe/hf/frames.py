"""Data of a call that an MoE layer inside it does not get: the sequences of its tokens, and the padding."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spectralmoe.hf.layer import HFLayer
from spectralmoe.recording import recomputing
from spectralmoe.routing import EMPTY, Routing

__all__ = ["Frame", "Frames", "frame_of", "parameter_names", "stack_around"]


@dataclass(frozen=True, slots=True)
class Frame:
    """The call of the stack around some layers.

    Attributes:
        shape: (B, S) of its tokens; None where it does not say.
        mask: (B, S) bool, True for a real token; None where it does not say.
    """

    shape: tuple[int, int] | None = None
    mask: Tensor | None = None

    def put(self, routing: Routing) -> Routing:
        """``routing`` with this shape, and with no expert for padding; as it is where the number of tokens differs."""
        count, shape, mask = len(routing.indices), self.shape, self.mask
        if shape is None or shape[0] * shape[1] != count:
            return routing
        routing = replace(routing, shape=shape)
        if mask is None or mask.numel() != count:
            return routing
        real = mask.reshape(-1).to(routing.indices.device)
        return replace(
            routing,
            mask=real,
            indices=routing.indices.masked_fill(~real[:, None], EMPTY),
            weights=torch.where(real[:, None], routing.weights, 0),
            asked=None if routing.asked is None else real.sum() * routing.indices.shape[1],
        )


class Frames:
    """The frames of the last calls of the stacks around ``layers``, by hooks on these stacks while it is open."""

    def __init__(self, model: nn.Module, layers: Sequence[HFLayer]) -> None:
        self._stacks = {id(layer): stack_around(model, layer.path) for layer in layers}
        self._names = {stack: parameter_names(stack) for stack in self._stacks.values()}
        self._frames: dict[nn.Module, Frame] = {}
        self._handles: list[RemovableHandle] = []

    def open(self) -> None:
        """Put the hooks in."""
        for stack in set(self._stacks.values()):
            self._handles.append(stack.register_forward_pre_hook(self._enter, with_kwargs=True))

    def close(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()

    def of(self, layer: HFLayer, tokens: Tensor) -> Frame:
        """The frame around ``layer``, which got ``tokens``: (N, D), or (B, S, D), which says the shape itself."""
        frame = self._frames.get(self._stacks[id(layer)], Frame())
        return Frame((tokens.shape[0], tokens.shape[1]), frame.mask) if tokens.dim() == 3 else frame

    def _enter(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not recomputing():
            self._frames[stack] = frame_of(self._names[stack], args, kwargs)


def stack_around(model: nn.Module, path: str) -> nn.Module:
    """The module that holds the numbered layers: ``model`` of ``model.layers.3.mlp``. It is called with the mask."""
    parts = path.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), 1)
    return model.get_submodule(".".join(parts[: max(first - 1, 0)]))


def parameter_names(stack: nn.Module) -> tuple[str, ...]:
    """The names of what its forward takes, in order."""
    return tuple(inspect.signature(stack.forward).parameters)


def frame_of(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Frame:
    """Shape and mask from the arguments of a call of a stack, whose positional ones have these ``names``.

    A mask that is longer than the input has the cached tokens first.
    """
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        return Frame()
    shape, mask = (tokens.shape[0], tokens.shape[1]), given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
        return Frame(shape)
    return Frame(shape, mask.detach()[:, mask.shape[1] - shape[1] :] != 0)

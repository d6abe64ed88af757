"""Weights files of other libraries: names and tensors are read, code is never run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.files import exists

__all__ = ["WRAPPERS", "read_tensors", "state_dict_of", "without_prefix"]

WRAPPERS = ("model", "state_dict", "module", "model_ema", "state_dict_ema")
"""Keys under which a state dict may lie, weights as they are before averages of them."""

_KEYS = ", ".join(map(repr, WRAPPERS))
_LISTED = 5


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in a ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` file (the last three by torch's loader for
    weights alone), as it is or under a key of ``WRAPPERS``.

    Raises:
        UserError: no such file, another kind of file, or one that holds more than names and tensors.
    """
    if not exists(path) or not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        raise UserError(f"{path}: the name of a weights file ends in .safetensors, .pth, .pt or .bin")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({str(error).splitlines()[0]})") from error
    except Exception as error:  # torch's own advice here is to run what the file holds
        raise UserError(
            f"{path} is not a torch weights file, or holds more than tensors; have it saved as a state dict alone"
        ) from error
    return state_dict_of(content, str(path))


def state_dict_of(source: Any, origin: str) -> dict[str, Tensor]:
    """The state dict that ``source`` is, or holds under a key of ``WRAPPERS``.

    Raises:
        UserError: it is none.
    """
    state = source
    for name in WRAPPERS:
        state = state[name] if isinstance(state, Mapping) and isinstance(state.get(name), Mapping) else state
    plain = isinstance(state, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    )
    if not plain:
        keys = [repr(key) for key in list(state)[:_LISTED]] if isinstance(state, Mapping) else []
        inside = f"; it holds {', '.join(keys)}" if keys else ""
        raise UserError(f"{origin} holds no state dict (names and tensors), alone or under {_KEYS}{inside}")
    return dict(state)


def without_prefix(tensors: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """``tensors`` without the prefix that a wrapper (``module.``, ``_orig_mod.``) or a trainer's class (``model.``) put
    in front of all names; as they are where the model wants no name that the prefix hides.

    >>> without_prefix({"module._orig_mod.head.bias": torch.zeros(2)}, ["head.bias", "head.weight"]).keys()
    dict_keys(['head.bias'])
    """
    inside = dict(tensors)
    while inside and inside.keys().isdisjoint(wanted):
        first = {name.partition(".")[0] for name in inside}
        if len(first) > 1 or not all("." in name for name in inside):
            return dict(tensors)
        inside = {name.partition(".")[2]: value for name, value in inside.items()}
    return inside

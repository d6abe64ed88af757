"""Checkpoints of a running training: one file, whole or absent, from which the run goes on to the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from spectralmoe.errors import UserError
from spectralmoe.files import exists, write_whole
from spectralmoe.layers import unwrapped
from spectralmoe.sharding import full, sharded_as

__all__ = ["load_checkpoint", "save_checkpoint"]

_FORMAT = 1


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: Optimizer, state: dict[str, Any], *, write: bool = True
) -> None:
    """Write weights, buffers, optimizer state, random state and ``state`` (JSON values) to one file.

    The optimizer's state is what it keeps for its parameters and under names of its own,
    ``optimizer.state["phase"] = {...}``: tensors, and JSON values. A sharded model is gathered first: every process
    must call, and the one with ``write`` writes.

    Raises:
        UserError: the file cannot be written; an older one stays as it was. The optimizer keeps something else.
    """
    tensors = {f"model.{name}": value for name, value in unwrapped(model).state_dict().items()}
    values: dict[str, Any] = {}
    for owner, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{owner}.{key}"] = value
            else:
                values[f"{owner}.{key}"] = _json_value(key, value)
    if values:
        state = {**state, "optimizer": values}
    tensors["random"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    metadata = {"state": json.dumps({"format": _FORMAT, **state})}
    whole = {name: full(value.detach()).cpu().contiguous().clone() for name, value in tensors.items()}
    if write:
        write_whole(path, lambda temporary: save_file(whole, temporary, metadata))


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any] | None:
    """Put the run back to where ``path`` left it; returns its ``state``, or None when there is no such file.

    Raises:
        UserError: the file is not a checkpoint of this run.
    """
    if not exists(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            state: dict[str, Any] = json.loads(file.metadata()["state"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model = unwrapped(model)
        targets = model.state_dict()
        weights = _under("model.", tensors)
        model.load_state_dict({name: sharded_as(value, targets.get(name)) for name, value in weights.items()})
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        saved = optimizer.state_dict()
        saved["state"] = {}
        for name, value in {**_under("optimizer.", tensors), **state.get("optimizer", {})}.items():
            owner, key = name.split(".", 1)
            if owner.isdecimal() and isinstance(value, Tensor):
                parameter = parameters[int(owner)]
                value = sharded_as(value, parameter if parameter.shape == value.shape else None)
            saved["state"].setdefault(int(owner) if owner.isdecimal() else owner, {})[key] = value
        optimizer.load_state_dict(saved)
        torch.set_rng_state(tensors["random"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} is not a checkpoint of this run ({str(error).splitlines()[0]}); remove it to start over"
        ) from error
    return state


def _json_value(key: str, value: Any) -> Any:
    """``value``, which comes back from JSON as it is."""
    try:
        if json.loads(json.dumps(value)) == value:
            return value
    except (TypeError, ValueError):
        pass
    raise UserError(
        f"the optimizer's state {key!r} is a {type(value).__name__}, which a checkpoint cannot keep; let it be a "
        "tensor or a JSON value"
    )


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

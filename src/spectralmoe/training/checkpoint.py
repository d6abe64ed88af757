"""Checkpoints of a training, written completely or not at all, from which the run is resumed.

A process that has the whole model writes one file, and goes on to the same bits; where FSDP2 shards it, every process
writes its part into a folder beside the file (``shards``). Each is read by any number of processes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from spectralmoe.errors import UserError
from spectralmoe.files import exists, write_whole
from spectralmoe.layers import below, unwrapped
from spectralmoe.sharding import is_sharded, sharded_as
from spectralmoe.training.distributed.ranks import ALONE, Ranks

__all__ = ["SHARDS", "load_checkpoint", "save_checkpoint"]

_FORMAT = 1
SHARDS = ".shards"
"""The suffix of the folder, in place of that of the file."""


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: Optimizer, state: dict[str, Any], *, ranks: Ranks = ALONE
) -> None:
    """Write weights, buffers, optimizer state, random state and ``state`` (JSON values).

    The optimizer's state is what it keeps for its parameters and under names of its own,
    ``optimizer.state["phase"] = {...}``: tensors, and JSON values. Every process must call; the random state is that
    of the first.

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
    random = {"random": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["random.cuda"] = torch.cuda.get_rng_state()
    state = {"format": _FORMAT, **state}
    if ranks.kind == "fsdp2":
        from spectralmoe.training.distributed.shards import write_shards

        name = _name(state)
        metadata = {"state": json.dumps({**state, "shards": name})}
        write_shards(path.with_suffix(SHARDS) / name, tensors, random, metadata, ranks=ranks)
        if ranks.first:
            path.unlink(missing_ok=True)
    elif ranks.first:
        metadata = {"state": json.dumps(state)}
        whole = {name: value.detach().cpu().contiguous().clone() for name, value in {**tensors, **random}.items()}
        write_whole(path, lambda temporary: save_file(whole, temporary, metadata))
        shutil.rmtree(path.with_suffix(SHARDS), ignore_errors=True)


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any] | None:
    """Put the run back to where ``path``, or the folder beside it, left it; returns its ``state``, or None when there
    is neither.

    Raises:
        UserError: it is not a checkpoint of this run.
    """
    places = [path] if exists(path) else []
    if exists(folder := path.with_suffix(SHARDS)):
        from spectralmoe.training.distributed.shards import STATE, newest

        places += [last / STATE for last in newest(folder)]
    if not places:
        return None
    try:
        tensors, state = max((_read_file(place) for place in places), key=lambda found: _name(found[1]))
        if "shards" in state:
            tensors |= _read_shards(folder / state["shards"], unwrapped(model), optimizer)
        _put_back(tensors, state, unwrapped(model), optimizer)
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} is not a checkpoint of this run ({str(error).splitlines()[0]}); remove it to start over"
        ) from error
    return state


def _put_back(tensors: dict[str, Tensor], state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
    targets = model.state_dict()
    weights = below("model.", tensors)
    model.load_state_dict({name: _laid_out(value, targets.get(name)) for name, value in weights.items()})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = optimizer.state_dict()
    saved["state"] = {}
    for name, value in {**below("optimizer.", tensors), **state.get("optimizer", {})}.items():
        owner, key = name.split(".", 1)
        if owner.isdecimal() and isinstance(value, Tensor):
            parameter = parameters[int(owner)]
            value = _laid_out(value, parameter if parameter.shape == value.shape else None)
        saved["state"].setdefault(int(owner) if owner.isdecimal() else owner, {})[key] = value
    optimizer.load_state_dict(saved)
    torch.set_rng_state(tensors["random"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        state: dict[str, Any] = json.loads(file.metadata()["state"])
        return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118


def _read_shards(folder: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The tensors of a folder, sharded as those of ``model`` are."""
    from spectralmoe.training.distributed.shards import read_sizes, read_tensors

    targets = {f"model.{name}": value for name, value in model.state_dict().items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    made = {}
    for name, (size, dtype) in read_sizes(folder).items():
        owner = name.split(".")[1]
        target = targets.get(name) if name in targets or not owner.isdecimal() else parameters[int(owner)]
        like = torch.empty(()).expand(size) if target is None or target.shape != size else target
        made[name] = torch.zeros_like(like, dtype=dtype)
    read_tensors(folder, made)
    return made


def _laid_out(value: Tensor, target: Tensor | None) -> Tensor:
    return value if is_sharded(value) else sharded_as(value, target)


def _name(state: dict[str, Any]) -> str:
    """A name for a checkpoint; those of a run are in the order of its steps."""
    return f"epoch{state.get('epoch', 0):06d}-batch{state.get('batch', 0):08d}"


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

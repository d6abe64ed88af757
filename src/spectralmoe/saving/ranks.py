"""Saves and loads the ranks of a model alone: its ``RankExperts`` without the linear layers, a few megabytes.

``parts.safetensors`` holds the tensors. ``config.json`` describes each layer and holds the SHA-256 of the model's other
weights, which the ranks belong to. Running statistics of norms are neither written nor compared. Nothing in either file
runs code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from spectralmoe.errors import UserError, first_line
from spectralmoe.layers import below, plain_name, unwrapped
from spectralmoe.model_folder import CONFIG, PARTS, read_config_of, read_model_folder, write_model
from spectralmoe.ranks import RankExperts, modules_of, put_ranks, refuse_parallel
from spectralmoe.saving.parts import digest_of
from spectralmoe.sharding import full
from spectralmoe.spec import build, describe

__all__ = ["load_ranks", "save_ranks"]

Model = TypeVar("Model", bound=nn.Module)
_KEY, _FORMAT = "spectralmoe_ranks", 1
_RUNNING = ("running_mean", "running_var", "num_batches_tracked")
_SIZES = ("ranks", "shared", "zero", "k")


def save_ranks(model: nn.Module, folder: str | Path, *, meta: dict[str, Any] | None = None) -> None:
    """Write the ranks that ``add_ranks`` added to ``model`` to ``folder``, without the model's own weights.

    Args:
        meta: JSON values that are saved with them.

    Raises:
        UserError: the model holds no ``RankExperts``; the folder cannot be written, or holds the ``config.json`` of
            something else.
    """
    inside = unwrapped(model)
    layers = _layers(inside)
    if not layers:
        raise UserError(f"save_ranks: {type(inside).__name__} holds no RankExperts; put some in with add_ranks")
    added = {f"{path}.{name}": value for path, layer in layers.items() for name, value in _own(layer).items()}
    config = {
        _KEY: _FORMAT,
        "layers": {path: _described(layer) for path, layer in layers.items()},
        "base_sha256": digest_of(_weights(_base(inside, layers))),
        "meta": meta or {},
    }
    write_model(Path(folder), config, {name: full(value).cpu().contiguous().clone() for name, value in added.items()})


def load_ranks(folder: str | Path, model: Model, *, allow: Sequence[str] = ()) -> Model:
    """Put the ranks that ``save_ranks`` wrote to ``folder`` into ``model``, in place, and freeze all other parameters.

    Args:
        model: the model in which they were trained, with the same weights and without ranks.
        allow: classes of scorers outside the library that may be built, as "pkg:Class".

    Raises:
        UserError: ``save_ranks`` did not write the folder; the model has other weights, has ranks already, is sharded
            or is under DDP, which would not sum the gradients of the ranks.

    >>> import tempfile
    >>> from spectralmoe.ranks import add_ranks
    >>> base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    >>> plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    >>> _ = plain.load_state_dict(base.state_dict())
    >>> _ = add_ranks(base, "0", ranks=6, zero=2, k=2)[0].up.data.normal_()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_ranks(base, folder)
    ...     loaded = load_ranks(folder, plain)
    >>> x = torch.randn(3, 4)
    >>> torch.equal(loaded(x), base(x))
    True
    """
    folder = Path(folder)
    config, tensors = read_model_folder(folder, partial(read_config_of, key=_KEY, version=_FORMAT, content="ranks"))
    refuse_parallel("load_ranks", model)
    inside = unwrapped(model)
    if _layers(inside):
        raise UserError(f"load_ranks: {type(inside).__name__} has ranks already; load into the model as it was before")
    if digest_of(_weights(inside.state_dict())) != config["base_sha256"]:
        raise UserError(f"{folder} holds ranks for another model than the one given: its weights differ (SHA-256)")
    layers: dict[str, RankExperts] = {}
    try:
        made: dict[nn.Module, RankExperts] = {}
        modules = modules_of(inside)
        for path, spec in config["layers"].items():
            linear = cast(nn.Linear, modules[path])
            made[linear] = layer = made.get(linear) or _built(linear, spec, allow)
            _fill(path, layer, tensors)
            layers[path] = layer
    except UserError:
        raise
    except Exception as error:  # whatever a constructor says to a file that was tampered with
        raise UserError(f"{folder} does not hold the ranks of a model ({first_line(error)})") from error
    return put_ranks(model, layers)


def _layers(model: nn.Module) -> dict[str, RankExperts]:
    """All layers with ranks, by every path that leads to them."""
    every = model.named_modules(remove_duplicate=False)
    return {plain_name(path): layer for path, layer in every if isinstance(layer, RankExperts)}


def _own(layer: RankExperts) -> dict[str, Tensor]:
    """The tensors of a layer by name, but for those of the linear layer."""
    state = layer.state_dict()
    return {name: value.detach() for name, value in state.items() if not name.startswith("linear.")}


def _weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict but for the statistics that norms collect, without wrappers' names."""
    return {plain_name(name): value for name, value in state.items() if name.rpartition(".")[2] not in _RUNNING}


def _base(model: nn.Module, layers: Mapping[str, RankExperts]) -> dict[str, Tensor]:
    """The tensors of the model as it was without ranks, under the names that they had."""
    state = {plain_name(name): value for name, value in model.state_dict().items()}
    for path, layer in layers.items():
        for name in _own(layer):
            del state[f"{path}.{name}"]
    moved = {f"{path}.linear.{name}": f"{path}.{name}" for path in layers for name in ("weight", "bias")}
    return {moved.get(name, name): value for name, value in state.items()}


def _described(layer: RankExperts) -> dict[str, Any]:
    return {**{name: getattr(layer, name) for name in _SIZES}, "scorer": describe(layer.router.scorer)}


def _built(linear: nn.Linear, spec: Mapping[str, Any], allow: Sequence[str]) -> RankExperts:
    """The layer that ``spec`` describes, without memory of its own: it cannot ask for more than its file holds."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        bare = nn.Linear(linear.in_features, linear.out_features)
        sizes = {name: spec[name] for name in _SIZES}
        layer = RankExperts(bare, scorer=build(spec["scorer"], allow=allow), **sizes)
    layer.linear = linear
    return layer.train(linear.training)


def _fill(path: str, layer: RankExperts, tensors: Mapping[str, Tensor]) -> None:
    """Give a layer without memory its tensors, on the device of its linear layer."""
    own = {name: value.shape for name, value in _own(layer).items()}
    given = below(f"{path}.", tensors)
    if own != {name: value.shape for name, value in given.items()}:
        raise UserError(f"{PARTS} holds other tensors for {path} than {CONFIG} describes; save them again")
    layer.load_state_dict({name: value.to(layer.linear.weight.device) for name, value in given.items()}, False, True)

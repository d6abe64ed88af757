"""Saves a whole model to a folder and loads it: the files are safetensors and JSON, and nothing in them runs code.

``config.json`` holds the SHA-256 of ``model.safetensors``; the two are always of the same save (``model_folder``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectralmoe.errors import UserError, first_line, refuse_differences
from spectralmoe.files import exists
from spectralmoe.json_files import read_json
from spectralmoe.layers import moe_layers, plain_name, unwrapped
from spectralmoe.manifold import warn_off_manifold
from spectralmoe.model_folder import CONFIG, WEIGHTS, build_checked, fill, read_model_folder, weights_file, write_model
from spectralmoe.saving.tables import TABLES
from spectralmoe.sharding import full, sharded_as
from spectralmoe.spec import build, describe
from spectralmoe.vision.model import VisionMoE

__all__ = ["FORMAT", "load", "read_config", "save"]

FORMAT = 1


def save(model: nn.Module, folder: str | Path, *, meta: dict[str, Any] | None = None) -> None:
    """Write ``model`` to ``folder``, as ``model.safetensors`` and ``config.json``.

    Tied tensors are written once, and names have no prefixes of wrappers (DDP, ``torch.compile``). A network of your
    own class is saved, too; ``load`` then needs ``into=``, because the folder does not describe it. A sharded model is
    gathered first: every rank must call. At any time the folder holds the old model or the new one, also if several
    processes save to it or one is killed. A basis that is not orthonormal, as after averaging weights, is written as it
    is, with a warning; ``retract(model)`` makes it orthonormal.

    Args:
        meta: JSON values that are saved with the model (class names, training settings, ...), see ``read_config``.

    Raises:
        UserError: the model holds no MoE layer; ``meta`` holds what JSON cannot; the folder cannot be written, or
            holds a ``config.json`` of another program.

    >>> import tempfile
    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK
    >>> layer = MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 16))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(layer, folder, meta={"steps": 0})
    ...     loaded, meta = load(folder), read_config(folder)["meta"]
    >>> torch.equal(loaded.experts.up, layer.experts.up), meta
    (True, {'steps': 0})
    """
    folder, model = Path(folder), unwrapped(model)
    warn_off_manifold(model)
    tensors, tied = _untied(model)
    config = {
        "spectralmoe": FORMAT,
        "versions": {"torch": torch.__version__},
        "model": _describe_or_none(model),
        "layers": _describe_layers(model),
        "tied": tied,
        "meta": meta or {},
    }
    write_model(folder, config, tensors)


def load(folder: str | Path, *, into: nn.Module | None = None, allow: Sequence[str] = ()) -> nn.Module:
    """Load the model that ``save`` wrote to ``folder``, in evaluation mode, on the CPU, in the dtypes of the file.

    Args:
        into: a model to fill, which keeps its devices, dtypes and shards; None builds the model that the folder
            describes. It is needed for a network of your own class.
        allow: classes outside this library that the folder may name, as "pkg:Class". Building one runs its code.

    Raises:
        UserError: it is no model folder, or its weights were changed; it names a class that was not allowed; ``into``
            has other layers; or tensors are missing, extra or of another shape, which the message lists.
    """
    folder = Path(folder)
    config, tensors = read_model_folder(folder, read_config)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        tied = dict(config["tied"])
        shapes |= {alias: shapes[name] for alias, name in tied.items()}
        model = unwrapped(into) if into is not None else _build(folder, config, shapes, allow)
        _check_layers(folder, model, config["layers"])
        _check_shapes(folder, model, shapes)
        tensors |= {alias: tensors[name] for alias, name in tied.items()}
        _fill(model, tensors, adopt_dtypes=into is None)
    except UserError:
        raise
    except Exception as error:  # whatever a constructor says to a config that was tampered with
        raise UserError(f"{folder / CONFIG} does not describe a model ({first_line(error)})") from error
    return (model if into is None else into).eval()


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the ``config.json`` of a model folder; ``["meta"]`` is what ``save`` was given.

    Raises:
        UserError: the folder holds no model that this version can read.
    """
    folder = Path(folder)
    if not exists(folder / CONFIG) or not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not a model folder: it has no {CONFIG} and {WEIGHTS}")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or "spectralmoe" not in config:
        raise UserError(f"{folder} is not a model folder of spectralmoe: its {CONFIG} was written by another program")
    if config["spectralmoe"] != FORMAT:
        raise UserError(f"{folder} has format {config['spectralmoe']!r}; this version reads format {FORMAT}")
    if not isinstance(config.get("layers"), dict) or not isinstance(config.get("meta"), dict):
        raise UserError(f"{folder / CONFIG} does not describe a model (no layers); save it again")
    if not weights_file(folder, config).is_file():
        raise UserError(f"{folder} is not a model folder: it has no {WEIGHTS}")
    return config


def _build(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], allow: Sequence[str]) -> nn.Module:
    """Build the described network; a config cannot ask for more than its file holds."""
    spec = config.get("model")
    if spec is None:
        raise UserError(
            f"{folder} does not describe the whole network; build it yourself and pass load(..., into=model)"
        )
    _bound(spec, max(sum(map(math.prod, shapes.values())), 2**12), folder)
    return build_checked(lambda: _network(folder, spec, allow), lambda shell: _check_shapes(folder, shell, shapes))


def _network(folder: Path, spec: Any, allow: Sequence[str]) -> nn.Module:
    model = build(spec, allow=allow, tables=TABLES)
    if not isinstance(model, nn.Module):
        raise UserError(f"{folder / CONFIG} describes a {type(model).__name__}, not a network")
    return model


def _bound(spec: Any, limit: int, folder: Path) -> None:
    """Refuse sizes that no file of ``limit`` numbers can have, before anything is built."""
    size = len(spec) if isinstance(spec, dict | list) else spec
    if isinstance(size, int) and abs(size) > limit:
        raise UserError(f"{folder / CONFIG} names a size of {size}, more than its weights hold; save the model again")
    if isinstance(spec, dict | list):
        for item in spec.values() if isinstance(spec, dict) else spec:
            _bound(item, limit, folder)


def _check_layers(folder: Path, model: nn.Module, expected: dict[str, Any]) -> None:
    layers = _describe_layers(model)
    for name in sorted(layers.keys() | expected.keys()):
        if _given(layers.get(name)) != _given(expected.get(name)):
            raise UserError(f"{folder} holds other MoE layers than the model: layer {name!r} differs; build it alike")


def _given(spec: Any) -> Any:
    """A spec without arguments that are None, which older folders may lack."""
    if isinstance(spec, dict):
        return {name: _given(value) for name, value in spec.items() if value is not None}
    return [_given(value) for value in spec] if isinstance(spec, list) else spec


def _check_shapes(folder: Path, model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    wanted = {plain_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    refuse_differences(f"{folder} does not fit the model", wanted, shapes)


def _untied(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with each tensor once, and alias -> name for the rest."""
    values = {plain_name(name): value for name, value in model.state_dict(keep_vars=True).items()}
    first: dict[int, str] = {}
    for name, value in values.items():
        first.setdefault(id(value), name)
    tied = {name: first[id(value)] for name, value in values.items() if first[id(value)] != name}
    whole = {name: full(value.detach()) for name, value in values.items() if name not in tied}
    return {name: value.cpu().contiguous().clone() for name, value in whole.items()}, tied


def _fill(model: nn.Module, tensors: dict[str, Tensor], *, adopt_dtypes: bool) -> None:
    """Copy the tensors into ``model``, which may be sharded in any way."""
    targets = model.state_dict(keep_vars=True)
    values = {name: sharded_as(tensors[plain_name(name)], target) for name, target in targets.items()}
    if adopt_dtypes:
        fill(model, values)
    else:
        model.load_state_dict(values)


def _describe_layers(model: nn.Module) -> dict[str, Any]:
    if isinstance(model, VisionMoE) and not model.parts():
        return {}  # a backbone before it gets its MoE parts
    return {name: _describe_or_none(layer) for name, layer in moe_layers(model).items()}


def _describe_or_none(part: nn.Module) -> Any:
    try:
        return describe(part, tables=TABLES)
    except UserError:
        return None

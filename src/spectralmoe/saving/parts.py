"""Saves and loads the trained parts of a ``VisionMoE`` alone: its MoE parts and head, a file of a few megabytes.

``parts.safetensors`` holds the tensors, ``config.json`` the description of the network and the SHA-256 of the backbone
that they belong to. Nothing in either runs code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from torch import Tensor, nn

from spectralmoe.digests import sha256_of_tensors
from spectralmoe.errors import UserError
from spectralmoe.json_files import read_json
from spectralmoe.layers import plain_name, unwrapped
from spectralmoe.manifold import warn_off_manifold
from spectralmoe.model_folder import CONFIG, PARTS, build_checked, fill, read_config_of, read_model_folder, write_model
from spectralmoe.saving.tables import TABLES
from spectralmoe.sharding import full
from spectralmoe.spec import build, describe
from spectralmoe.vision.model import VisionMoE

__all__ = ["digest_of", "holds_parts", "load_parts", "read_parts_config", "save_parts"]

_KEY, _FORMAT = "spectralmoe_parts", 1


def save_parts(model: VisionMoE, folder: str | Path, *, meta: dict[str, Any] | None = None) -> None:
    """Write the MoE parts and the head of ``model`` to ``folder``, without the rest of the backbone.

    Args:
        meta: JSON values that are saved with them, see ``read_parts_config``.

    Raises:
        UserError: the folder cannot be written, or holds the ``config.json`` of something else.
    """
    model = cast(VisionMoE, unwrapped(model))
    warn_off_manifold(model)
    of_parts, rest = _split(model)
    config = {
        _KEY: _FORMAT,
        "model": describe(model, tables=TABLES),
        "backbone_sha256": digest_of(rest),
        "meta": meta or {},
    }
    tensors = {name: full(value.detach()).cpu().contiguous().clone() for name, value in of_parts.items()}
    write_model(Path(folder), config, tensors)


def load_parts(folder: str | Path, backbone: nn.Module | Mapping[str, Tensor]) -> VisionMoE:
    """Load the model whose parts ``save_parts`` wrote to ``folder``, on a given backbone, in evaluation mode.

    Args:
        backbone: a timm model, a ``VisionMoE`` or a state dict with timm's names; it is copied, and its own MoE parts
            and head are not used.

    Raises:
        UserError: the folder holds no such parts, or the parts were trained on another backbone.
    """
    folder = Path(folder)
    config, tensors = read_model_folder(folder, read_parts_config)
    try:
        given = _own_names(backbone)

        def check(model: VisionMoE) -> None:
            of_parts, rest = _split(model)
            used = {name: given[name] for name in rest if name in given}
            if digest_of(used) != config["backbone_sha256"]:
                what = _difference(rest, used)
                raise UserError(f"{folder} holds parts for another backbone than the one given: {what}")
            shapes, found = ({name: value.shape for name, value in one.items()} for one in (of_parts, tensors))
            if shapes != found:
                raise UserError(f"{folder / PARTS} holds other tensors than {CONFIG} describes; save them again")

        model: VisionMoE = build_checked(lambda: build(config["model"], tables=TABLES), check)
        values = {**given, **tensors}
        fill(model, {name: values[name] for name in model.state_dict()})
    except (SafetensorError, OSError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{folder} does not hold the parts of a model ({reason}); save them again") from error
    return model.eval()


def _split(model: VisionMoE) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state dict in two: MoE parts and head, and the rest."""
    model = cast(VisionMoE, unwrapped(model))
    state = {plain_name(name): value for name, value in model.state_dict(keep_vars=True).items()}
    trained = [*model.parts().values(), *model.heads()]
    ids = {id(value) for part in trained for value in part.state_dict(keep_vars=True).values()}
    of_parts = {name: value for name, value in state.items() if id(value) in ids}
    return of_parts, {name: value for name, value in state.items() if name not in of_parts}


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of tensors: of their names, dtypes and values."""
    items = sorted(tensors.items())
    return sha256_of_tensors((f"{name} {value.dtype} {tuple(value.shape)}\n", value) for name, value in items)


def _own_names(backbone: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a backbone by their names in a ``VisionMoE``."""
    if not isinstance(backbone, nn.Module):
        return {f"backbone.{name}": value for name, value in backbone.items()}
    inside = unwrapped(backbone)
    state = (inside.backbone if isinstance(inside, VisionMoE) else inside).state_dict()
    return {f"backbone.{plain_name(name)}": full(value) for name, value in state.items()}


def _difference(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    missing = sorted(wanted.keys() - given.keys())
    if missing:
        return f"it has no {missing[0].removeprefix('backbone.')!r}"
    misshaped = [name for name, value in wanted.items() if value.shape != given[name].shape]
    if misshaped:
        return f"{misshaped[0].removeprefix('backbone.')!r} has another shape"
    return "its weights differ (SHA-256)"


def holds_parts(folder: Path) -> bool:
    """Return whether ``save_parts`` wrote what ``folder`` holds.

    Raises:
        UserError: its ``config.json`` is no JSON.
    """
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    return isinstance(config, dict) and _KEY in config


def read_parts_config(folder: Path) -> dict[str, Any]:
    """Read the ``config.json`` of a folder that ``save_parts`` wrote; ``["meta"]`` is what it was given.

    Raises:
        UserError: ``save_parts`` did not write the folder.
    """
    return read_config_of(folder, _KEY, _FORMAT, "parts")

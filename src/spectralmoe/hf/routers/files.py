"""The routers of a swapped model in two files beside the stock ones: written, and put into a model of that base.

``spectral_routers.json`` describes the router of each layer and the base that they belong to, by its shapes and the
SHA-256 of its gates in every precision; ``spectral_routers.safetensors`` holds their tensors by ``LAYER.NAME``, and
copies of experts by ``LAYER.copies.NAME``. Nothing in either runs code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectralmoe.digests import sha256_of, sha256_of_tensors
from spectralmoe.errors import UserError, first_line, refuse_differences
from spectralmoe.files import exists
from spectralmoe.hf.layers import find_layers
from spectralmoe.hf.routers.copies import add_copies, copies_of, placed_layers, refuse_plain_saving, without_copies
from spectralmoe.hf.routers.places import put_in, swapped_routers
from spectralmoe.hf.routers.rules import read_rule
from spectralmoe.hf.routers.swapped import SwappedRouter
from spectralmoe.json_files import read_json, write_json
from spectralmoe.layers import below, unwrapped
from spectralmoe.model_folder import build_checked, fill
from spectralmoe.placement import Placement
from spectralmoe.router import Router
from spectralmoe.sharding import full
from spectralmoe.spec import build, describe

__all__ = ["ROUTERS", "put_routers", "read_routers_config", "stock_tensors", "write_routers"]

ROUTERS, TENSORS = "spectral_routers.json", "spectral_routers.safetensors"
_KEY, _FORMAT, _COPIES = "spectralmoe_routers", 1, "copies."
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Precisions that a model may be loaded in."""


def write_routers(model: nn.Module, folder: Path) -> None:
    """Write the routers of a swapped model to ``folder``, beside the files of the stock one.

    Raises:
        UserError: no layer of ``model`` was swapped; a router that cannot be described.
    """
    swapped = swapped_routers(model)
    placed = placed_layers(model)
    layers: dict[str, Any] = {}
    parts: dict[str, Tensor] = {}
    for name, each in swapped.items():
        gate = {part: [_digest(value.to(dtype)) for dtype in _DTYPES] for part, value in _gate(each).items()}
        layers[name] = {"router": describe(each.router), "gate": gate}
        copies = {}
        if each.placement is not None:
            layers[name] |= each.placement.spec_arguments()
            copies = {f"{_COPIES}{part}": value for part, value in copies_of(placed[name]).items()}
        parts |= {f"{name}.{part}": value for part, value in {**each.router.state_dict(), **copies}.items()}
    tensors = {name: full(value).detach().cpu().contiguous().clone() for name, value in parts.items()}
    save_file(tensors, folder / TENSORS)
    config = {
        _KEY: _FORMAT,
        "versions": {"torch": torch.__version__},
        "layers": layers,
        "shapes": {name: list(value.shape) for name, value in stock_tensors(model).items()},
        "sha256": sha256_of(folder / TENSORS),
        "files": sorted({path.name for path in folder.iterdir() if _of_model(path.name)} | {ROUTERS}),
    }
    write_json(folder / ROUTERS, config)


def read_routers_config(folder: Path) -> dict[str, Any]:
    """What ``spectral_routers.json`` in ``folder`` describes.

    Raises:
        UserError: there is none, or none that this version can read.
    """
    if not exists(folder / ROUTERS):
        raise UserError(f"{folder} holds no swapped routers: it has no {ROUTERS}, which save_swapped writes")
    config = read_json(folder / ROUTERS)
    if not isinstance(config, dict) or config.get(_KEY) != _FORMAT:
        raise UserError(
            f"{folder / ROUTERS} describes no routers of format {_FORMAT}, which this version reads; save them again"
        )
    layers, shapes = config.get("layers"), config.get("shapes")
    if not isinstance(shapes, dict) or not isinstance(layers, dict):
        raise UserError(f"{folder / ROUTERS} lacks the layers or the shapes of their base; save the model again")
    if not all(map(_is_described, layers.values())):
        raise UserError(f"{folder / ROUTERS} describes a layer without its router and gate; save the model again")
    return config


def put_routers(model: nn.Module, folder: Path, *, allow: Sequence[str] = ()) -> None:
    """Put the routers that ``write_routers`` wrote to ``folder`` into a model of their base, which was not swapped.

    Args:
        allow: classes outside spectralmoe's tables that the folder may name, as "pkg:Class".

    Raises:
        UserError: no such files, or damaged ones; a model of other shapes or with other gates.
    """
    config = read_routers_config(folder)
    stock, layers = unwrapped(model), {layer.name: layer for layer in find_layers(unwrapped(model))}
    other = f"the routers in {folder} belong to another model"
    refuse_differences(other, {n: value.shape for n, value in stock_tensors(stock).items()}, config["shapes"])
    for name, layer in config["layers"].items():
        if name not in layers or isinstance(layers[name].router, SwappedRouter):
            raise UserError(f"{other}: {name!r} is no layer here with the router of its family")
        here = {part: _digest(value) for part, value in _gate(layers[name].router).items()}
        if here.keys() != layer["gate"].keys() or any(here[part] not in layer["gate"][part] for part in here):
            raise UserError(f"{other}: the gate of {name} has other weights (SHA-256)")
    tensors = _read_tensors(folder, config.get("sha256"))
    routers, copies = {}, {}
    for name, layer in config["layers"].items():
        device = next(layers[name].router.parameters()).device
        values = below(f"{name}.", tensors)
        copies[name] = {n.removeprefix(_COPIES): values.pop(n) for n in list(values) if n.startswith(_COPIES)}
        routers[layers[name]] = _router(f"{folder / ROUTERS}, {name}", layer["router"], values, allow).to(device)
    put_in(stock, {layer: (router, read_rule(layer)[0]) for layer, router in routers.items()})
    for layer in find_layers(stock):
        if "table" in config["layers"].get(layer.name, ()):
            add_copies(layer, Placement(config["layers"][layer.name]["table"]), copies[layer.name])
            refuse_plain_saving(stock)


def stock_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model as its family has it: a swapped layer with the gate that it had before, no copies."""
    state: dict[str, Tensor] = model.state_dict()
    for layer in placed_layers(model).values():
        state |= without_copies(layer)
    ours = tuple(f"{path}.router." for path, each in model.named_modules() if isinstance(each, SwappedRouter))
    return {name: value for name, value in state.items() if not name.startswith(ours)}


def _router(start: str, spec: Any, tensors: Mapping[str, Tensor], allow: Sequence[str]) -> Router:
    """The router that ``spec`` describes; it cannot ask for more memory than its file holds."""

    def check(router: nn.Module) -> None:
        wanted = {name: value.shape for name, value in router.state_dict().items()}
        refuse_differences(start, wanted, {name: value.shape for name, value in tensors.items()})

    try:
        router = build_checked(lambda: build(spec, allow=allow), check)
        fill(router, tensors)
    except UserError:
        raise
    except Exception as error:  # whatever a constructor says to a file that was tampered with
        raise UserError(f"{start}: no router is described ({first_line(error)})") from error
    if not isinstance(router, Router):
        raise UserError(f"{start}: describes a {type(router).__name__}, not a router")
    return router


def _read_tensors(folder: Path, digest: Any) -> dict[str, Tensor]:
    try:
        tensors, same = load_file(folder / TENSORS), sha256_of(folder / TENSORS) == digest
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{folder / TENSORS} cannot be read ({first_line(error)}); save the model again") from error
    if not same:
        raise UserError(
            f"{folder / TENSORS} holds other routers than {ROUTERS} describes (SHA-256); save the model again"
        )
    return tensors


def _is_described(layer: Any) -> bool:
    """Whether it says what router a layer has, and what gate was there before."""
    whole = isinstance(layer, dict) and layer.keys() - {"table"} == {"router", "gate"}
    return whole and isinstance(layer["gate"], dict)


def _of_model(name: str) -> bool:
    """Whether ``save_pretrained`` or ``write_routers`` writes files of this name."""
    return name in ("config.json", "generation_config.json", ROUTERS) or ".safetensors" in name


def _gate(router: nn.Module) -> dict[str, Tensor]:
    """The tensors of a stock router, or those that a swapped one keeps of it."""
    state = router.state_dict()
    kept = [name for name in state if not (isinstance(router, SwappedRouter) and name.startswith("router."))]
    return {name: full(state[name]).detach().cpu() for name in sorted(kept)}


def _digest(value: Tensor) -> str:
    """The SHA-256 of a shape and its values, whatever precision they are stored in."""
    return sha256_of_tensors([(f"{tuple(value.shape)}\n", value.double())])

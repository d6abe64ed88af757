"""The rows: how a trained network is aligned, the shifts that it meets, and what it does under them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spectralmoe import MoE, record
from spectralmoe.diagnostics import evaluation_mode, max_vio
from spectralmoe.layers import moe_layers
from spectralmoe.scorers import StatisticsMemory

__all__ = ["ROWS", "SHIFTS", "Row", "aligned", "behaviour", "measured", "shifted"]

_CHUNK = 500


class Row(NamedTuple):
    """How a network is aligned.

    Attributes:
        where, over: as in ``StatisticsMemory``; None: not at all.
        clean: with the statistics of all training tokens; else of the images of two classes.
    """

    where: str | None
    over: str = "sample"
    clean: bool = True

    @property
    def tunable(self) -> bool:
        """Whether ``least`` says something: of a stream of many tokens it does not."""
        return self.where is not None and self.over == "sample"


ROWS: dict[str, Row] = {
    "none": Row(None),
    "router": Row("router"),
    "layer": Row("layer"),
    "router, two classes": Row("router", clean=False),
    "layer, two classes": Row("layer", clean=False),
    "router, stream": Row("router", "stream"),
    "layer, stream": Row("layer", "stream"),
    "layer, stream, two classes": Row("layer", "stream", clean=False),
}


def _noisy(images: Tensor, draw: torch.Generator) -> Tensor:
    return images + 0.2 * torch.randn(images.shape, generator=draw)


def _occluded(images: Tensor, draw: torch.Generator) -> Tensor:
    """A black square of half the side, at a place of its own in each image."""
    side = images.shape[-1]
    low = torch.randint(side // 2 + 1, (len(images), 2), generator=draw)
    place = torch.arange(side)
    inside = [(place >= low[:, axis, None]) & (place < low[:, axis, None] + side // 2) for axis in (0, 1)]
    return images.masked_fill((inside[0][:, :, None] & inside[1][:, None])[:, None], 0)


SHIFTS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "clean": lambda images, draw: images,
    "contrast": lambda images, draw: 0.5 + 0.5 * (images - 0.5),
    "brightness": lambda images, draw: images + 0.3,
    "noise": _noisy,
    "occlusion": _occluded,
}


def shifted(images: Tensor, shift: str, seed: int) -> Tensor:
    """The images under a shift, within [0, 1]."""
    return SHIFTS[shift](images, torch.Generator().manual_seed(seed)).clamp(0, 1)


def aligned(network: nn.Module, row: Row, *, least: int, unlabelled: Tensor, two_classes: Tensor) -> nn.Module:
    """A copy of ``network`` that is aligned as ``row`` says.

    Args:
        unlabelled: images of the shift at hand, for rows that observe a stream.
        two_classes: clean training images of two classes.
    """
    network = copy.deepcopy(network).eval()
    layers: dict[str, Any] = dict(moe_layers(network))
    trained = {name: layer.memory for name, layer in layers.items()}
    for layer in layers.values():
        layer.memory = None
    if row.where is None:
        return network
    others = {} if row.clean else _tokens(network, two_classes)
    for name, layer in layers.items():
        memory = StatisticsMemory(trained[name].dim, where=row.where, over=row.over, least=least)
        if row.clean:
            memory.load_state_dict(trained[name].state_dict())
        else:
            memory.update(memory.statistics(others[name], torch.zeros(0)))
        layer.memory = memory.eval()
    for name, layer in layers.items() if row.over == "stream" else ():  # a layer reads what those before it let through
        layer.memory.observe(_tokens(network, unlabelled)[name])
    return network


@torch.no_grad()
def behaviour(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions (N,) and the expert of every token in every layer (L, T)."""
    predictions, experts = [], []
    for part in images.split(_CHUNK):
        with evaluation_mode(network), record(network) as tape:
            predictions.append(network(part).argmax(-1))
        experts.append(torch.stack([item.routing.indices[:, 0] for item in tape]))
    return torch.cat(predictions), torch.cat(experts, 1)


def measured(
    predictions: Tensor, experts: Tensor, labels: Tensor, before: Tensor, num_experts: int
) -> dict[str, float]:
    """Accuracy, the share of tokens with another expert than ``before``, and MaxVio, mean over layers."""
    loads = [torch.bincount(layer, minlength=num_experts) for layer in experts]
    return {
        "accuracy": 100 * float((predictions == labels).float().mean()),
        "changed": float((experts != before).float().mean()),
        "max_vio": sum(max_vio(load / load.sum()) for load in loads) / len(loads),
    }


@torch.no_grad()
def _tokens(network: nn.Module, images: Tensor) -> Mapping[str, Tensor]:
    """What the router of each layer reads."""
    with evaluation_mode(network), record(network, keep=("tokens",)) as tape:
        network(images)
    return {item.name: item.tensor("tokens") for item in tape if isinstance(item.layer, MoE)}

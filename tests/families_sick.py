"""The nine tiny families made healthy by construction, and then sick in one way each.

Healthy: every token of the vocabulary has its own direction, the routers look for just those, as many tokens for one
expert as for the next, and experts are unlike. What attention adds is small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from families import FAMILIES
from seeds import generator
from torch import Tensor, nn

from spectralmoe.hf.layer import HFLayer
from spectralmoe.hf.layers import find_layers

__all__ = ["SICK", "healthy", "matrix_of", "stacks"]


def healthy(name: str) -> Any:
    """The model of family ``name``, balanced by construction, with clear margins."""
    model = FAMILIES[name]()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.dim() > 1 and "experts" not in key:
                value.mul_(0.02)  # attention, dense layers and shared experts hardly speak
            elif "norm" in key:
                value.fill_(1.0)
            elif key.endswith("bias") or "sinks" in key:
                value.zero_()
        for key, value in model.named_buffers():
            if key.endswith("correction_bias"):
                value.zero_()
        layers = find_layers(model)
        experts = layers[0].num_experts
        words = model.get_input_embeddings().weight
        words.zero_()
        token = torch.arange(len(words))
        for place, size in enumerate((10.0, 6.0, 3.0)):
            words[token, (token + place) % experts] = size
        for layer in layers:
            _experts(layer)
            matrix = matrix_of(layer)
            matrix.zero_()
            matrix[torch.arange(experts), torch.arange(experts)] = 1.0
    return model


def collapsed(name: str) -> Any:
    """Every token goes to the same experts."""
    model = healthy(name)
    with torch.no_grad():
        words = model.get_input_embeddings().weight
        words[:, -1] = 20.0
        for layer in find_layers(model):
            matrix = matrix_of(layer)
            matrix[:, -1] = -1.0
            matrix[: layer.top_k, -1] = 1.0
    return model


def identical(name: str) -> Any:
    """All experts of a layer are the same."""
    model = healthy(name)
    with torch.no_grad():
        for layer in find_layers(model):
            for _, values in stacks(layer):
                for value in values[1:]:
                    value.copy_(values[0])
    return model


def tied(name: str) -> Any:
    """The routers hardly tell their experts apart."""
    model = healthy(name)
    with torch.no_grad():
        for layer in find_layers(model):
            matrix_of(layer).mul_(1e-3)
    return model


def flipping(name: str) -> Any:
    """Two large parts of every logit cancel in fp32, but bf16 rounds them apart."""
    model = healthy(name)
    with torch.no_grad():
        words = model.get_input_embeddings().weight
        words[:, -2], words[:, -1] = 20.0, 60.0
        for layer in find_layers(model):
            matrix = matrix_of(layer)
            large = 40 + 4 * torch.randn(len(matrix), generator=generator(0))
            matrix.mul_(0.2)
            matrix[:, -2], matrix[:, -1] = large, -large / 3
    return model


SICK: dict[str, Callable[[str], Any]] = {
    "collapse": collapsed,
    "homogeneous": identical,
    "near_tie": tied,
    "precision_flip": flipping,
}
"""The kind of finding -> what makes a model have it."""


def matrix_of(layer: HFLayer) -> Tensor:
    """The routing matrix itself."""
    return layer.router.get_parameter(layer._matrix or "")


def stacks(layer: HFLayer) -> list[tuple[str, list[Tensor]]]:
    """Parameter name -> that of each expert."""
    if isinstance(layer.experts, nn.ModuleList | nn.ModuleDict):
        parts = [dict(part.named_parameters()) for part in layer.experts.children() if list(part.parameters())]
        return [(name, [part[name] for part in parts]) for name in parts[0]]
    return [(name, list(value)) for name, value in layer.experts.named_parameters()]


def _experts(layer: HFLayer) -> None:
    """Unlike experts that hardly change the tokens."""
    draw = generator(layer.number)
    for name, values in stacks(layer):
        for value in values:
            value.copy_(torch.randn(value.shape, generator=draw) * (0.01 if "down" in name or "wo" in name else 0.3))

"""The network that a training run builds, and what is saved beside it."""

from __future__ import annotations

from typing import Any

import torch

from spectralmoe.models import SRMoE, sr_moe
from spectralmoe.training.data import ImageData
from spectralmoe.training.routers import find_preset, router_factory
from spectralmoe.training.settings import Network

__all__ = ["CHECKPOINT", "build_network", "model_meta"]

CHECKPOINT = "training.safetensors"
"""The checkpoint's name in the folder of a run."""


def build_network(data: ImageData, network: Network, router: str, depth: int, seed: int) -> SRMoE:
    """The network of one row: under one seed all rows start with the same stem, experts and head."""
    torch.manual_seed(seed)
    pixels = data.train.images
    return sr_moe(
        data.num_classes,
        channels=data.channels,
        width=network.width,
        depth=depth,
        num_experts=network.num_experts,
        hidden=network.hidden,
        router=router_factory(find_preset(router), network.top_k),
        mean=[round(v, 4) for v in pixels.mean((0, 2, 3)).tolist()],
        std=[max(round(v, 4), 1e-3) for v in pixels.std((0, 2, 3)).tolist()],
    )


def model_meta(data: ImageData, router: str) -> dict[str, Any]:
    """What a saved network needs to be used on images: classes, image size, where it was trained."""
    return {
        "data": data.name,
        "classes": list(data.classes),
        "channels": data.channels,
        "image_size": list(data.image_size),
        "router": router,
    }

"""The image network that a training run builds, what is saved beside it, and the data that fit it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from spectralmoe.data.image_data import ImageData, load_data
from spectralmoe.errors import UserError
from spectralmoe.models import ConvStem, SRMoE, sr_moe
from spectralmoe.presets import find_preset
from spectralmoe.training.settings import Network, Row, Settings, Several, parse
from spectralmoe.vision.model import VisionMoE

__all__ = [
    "CHECKPOINT",
    "ModelMeta",
    "build_network",
    "fitting_data",
    "model_meta",
    "pixel_statistics",
    "read_image_meta",
]

CHECKPOINT = "training.safetensors"
"""The checkpoint's name in the folder of a run."""


def build_network(data: ImageData, network: Network, row: Row, depth: int, seed: int) -> SRMoE:
    """The network of one row: under one seed all rows start with the same stem and head, and the same experts but
    where a row has a bank of its own.

    Raises:
        UserError: as ``find_preset``; what its parts refuse.
    """
    preset = find_preset(row)
    num_experts, hidden = preset.sizes(network.num_experts, network.hidden, network.k)
    torch.manual_seed(seed)
    mean, std = pixel_statistics(data)
    return sr_moe(
        data.num_classes,
        channels=data.channels,
        width=network.width,
        depth=depth,
        num_experts=num_experts,
        hidden=hidden,
        experts=partial(preset.make_experts, spare=network.spare),
        router=preset.routers(network.k),
        mean=mean,
        std=std,
    )


def pixel_statistics(data: ImageData) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of the training images."""
    pixels = data.train.images
    mean, std = pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3)).tolist()
    return [round(v, 4) for v in mean], [max(round(v, 4), 1e-3) for v in std]


class ModelMeta(Settings):
    """What a saved network needs to be used on images.

    Attributes:
        hold_out: the class that training did not see.
        results: measured after training.
        settings: of the run that trained it.
    """

    data: str
    classes: Several[str]
    channels: Annotated[int, Field(ge=1)]
    image_size: Annotated[
        tuple[Annotated[int, Field(ge=1, le=4096)], Annotated[int, Field(ge=1, le=4096)]], Field(strict=False)
    ]
    router: str
    hold_out: str | None = None
    results: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)

    @property
    def side(self) -> int | None:
        """The side that the images of a folder are resized to when they are read; None: as the folder has them."""
        height, width = self.image_size
        return height if height == width else None


def model_meta(data: ImageData, router: str, hold_out: str | None = None, **known: dict[str, Any]) -> dict[str, Any]:
    """What is saved beside a network that ``router`` was trained with on ``data``, without class ``hold_out``.

    Args:
        known: results and settings of the run.
    """
    meta = ModelMeta(
        data=data.name,
        classes=data.classes,
        channels=data.channels,
        image_size=data.image_size,
        router=router,
        hold_out=hold_out,
        **known,
    )
    return meta.model_dump(mode="json")


def read_image_meta(network: nn.Module, values: Any, folder: Path) -> ModelMeta:
    """What was saved beside an image network.

    Raises:
        UserError: another network; values that are missing, or do not fit it.
    """
    if isinstance(network, VisionMoE):
        channels, classes = network.channels, network.num_classes
    elif isinstance(network, SRMoE) and isinstance(network.stem, ConvStem):
        channels, classes = network.stem.channels, network.num_classes
    else:
        raise UserError(f"{folder} holds a {type(network).__name__} that is not an image network")
    meta = parse(ModelMeta, values, f"{folder / 'config.json'}: meta")
    hold_out_fits = meta.hold_out in (None, *meta.classes)
    if meta.channels != channels or len(meta.classes) != classes or not hold_out_fits:
        raise UserError(f"{folder / 'config.json'}: meta does not fit the network")
    return meta


def fitting_data(name: str | None, meta: ModelMeta, data_dir: Path | None, download: bool) -> ImageData:
    """The data set called ``name``, or the one that the network was trained on.

    Raises:
        UserError: it cannot be had, or does not fit the network.
    """
    data = load_data(name or meta.data, data_dir=data_dir, download=download, side=meta.side)
    for what, given, wanted in (
        ("channels", data.channels, meta.channels),
        ("an image size of", data.image_size, meta.image_size),
        ("the classes", data.classes, meta.classes),
    ):
        if given != wanted:
            raise UserError(f"{data.name!r} does not fit the model: it has {what} {given}, the model {wanted}")
    return data

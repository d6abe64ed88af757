"""A timm model with MoE parts, built as the settings ask, and what is saved beside it."""

from __future__ import annotations

from pathlib import Path

import torch

from spectralmoe.checkpoints.weights_file import read_tensors, without_prefix
from spectralmoe.data.image_data import ImageData
from spectralmoe.errors import UserError, refuse_differences
from spectralmoe.saving import load
from spectralmoe.training.network import pixel_statistics
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.settings.vision import Backbone, MoEParts
from spectralmoe.vision import BranchSpec, add_branches, replace_mlp
from spectralmoe.vision.model import VisionMoE, check_images, vision_moe

__all__ = [
    "add_parts",
    "build_vision",
    "load_weights",
    "make_spec",
]


def build_vision(data: ImageData, wanted: Backbone, settings: TrainSettings) -> VisionMoE:
    """The network of a run on the backbone; under one seed all routers start with the same backbone and head.

    Raises:
        UserError: what timm or the MoE parts refuse; weights that are missing or do not fit.
    """
    if wanted.pretrained and wanted.checkpoint is not None:
        raise UserError("backbone: pretrained and checkpoint are two sources of the same weights; keep one")
    torch.manual_seed(settings.optimization.seed)
    mean, std = pixel_statistics(data)
    network = vision_moe(
        wanted.name,
        data.num_classes,
        channels=data.channels,
        arguments=wanted.arguments,
        pretrained=wanted.pretrained,
        size=settings.image_size,
        mean=mean,
        std=std,
    )
    if wanted.checkpoint is not None:
        load_weights(network, Path(wanted.checkpoint).expanduser())
    check_images(network, data.image_size)
    if settings.moe is not None:
        add_parts(network, settings.moe, settings.optimization.seed)
    if wanted.frozen:
        network.freeze()
    if wanted.gradient_checkpointing:
        _checkpoint_blocks(network)
    return network


def add_parts(network: VisionMoE, wanted: MoEParts, seed: int) -> None:
    """Put the MoE parts into the backbone; their initial weights depend only on the seed."""
    torch.manual_seed(seed)
    spec = make_spec(wanted)
    if wanted.kind == "branches":
        add_branches(network.backbone, spec)
        return
    replace_mlp(network.backbone, spec, init=wanted.init)


def make_spec(wanted: MoEParts) -> BranchSpec:
    """The spec that the settings describe.

    Raises:
        UserError: as ``BranchSpec.of``.
    """
    chosen = {key: getattr(wanted, key) for key in ("tokens", "start") if getattr(wanted, key) is not None}
    return BranchSpec.of(
        wanted.router, k=wanted.k, experts=wanted.experts, bottleneck=wanted.bottleneck, blocks=wanted.blocks, **chosen
    )


def load_weights(network: VisionMoE, path: Path) -> None:
    """Fill the backbone from a file with timm's names, be it below a wrapper's prefix, or from the folder of a dense
    ``VisionMoE``.

    Pixel statistics come along from a folder. A classifier of another size is left as it is.

    Raises:
        UserError: not such a file or folder; tensors that are missing, extra or of another shape, with the list.
    """
    if path.is_dir():
        source = load(path)
        if not isinstance(source, VisionMoE):
            raise UserError(f"{path} holds a {type(source).__name__}, not the backbone of a timm model")
        tensors = dict(source.backbone.state_dict())
        network.mean, network.std = source.mean, source.std
    else:
        tensors = without_prefix(read_tensors(path), network.backbone.state_dict().keys())
    expected = network.backbone.state_dict()
    head = {id(p) for module in network.heads() for p in module.state_dict(keep_vars=True).values()}
    heads = [name for name, value in network.backbone.state_dict(keep_vars=True).items() if id(value) in head]
    for name in heads:
        if name not in tensors or tensors[name].shape != expected[name].shape:
            tensors |= {name: expected[name] for name in heads}
    shapes, given = ({name: value.shape for name, value in part.items()} for part in (expected, tensors))
    refuse_differences(f"{path} does not fit {network.name!r}", shapes, given)
    network.backbone.load_state_dict(tensors)


def _checkpoint_blocks(network: VisionMoE) -> None:
    try:
        network.backbone.set_grad_checkpointing(True)
    except Exception as error:  # families without it say so with an assertion, or have no such method
        raise UserError(f"timm model {network.name!r} has no gradient checkpointing; leave it out") from error

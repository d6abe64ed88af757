"""timm models with MoE parts as one network that can be described, saved and loaded: timm is imported here alone.

The model is timm's own (https://github.com/huggingface/pytorch-image-models, Apache-2.0), by name and arguments; its
forward is not touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.errors import UserError, first_line
from spectralmoe.experts import ModuleExperts
from spectralmoe.moe import MoE
from spectralmoe.recording import Recordable
from spectralmoe.vision.attended import put_layer
from spectralmoe.vision.branches import Branch, put_branch
from spectralmoe.vision.replace_mlp import MlpCopies

__all__ = ["VisionMoE", "check_images", "vision_moe"]

OURS = {
    "num_classes": "it comes with the data",
    "in_chans": "it comes with the data (channels)",
    "pretrained": "say pretrained beside the arguments",
    "checkpoint_path": "say checkpoint beside the arguments",
}
"""Arguments of timm that have a place of their own here."""


class VisionMoE(nn.Module):
    """Images (B, C, H, W) with values in [0, 1] -> class logits (B, num_classes): a timm model, MoE parts in it.

    Add the parts to ``backbone`` (``add_branches``, ``replace_mlp``). ``spectralmoe.save`` and ``load`` know the whole.

    Args:
        name: of the timm model; its weights are random (``vision_moe`` fetches them).
        num_classes: number of logits.
        channels: C, 1 for grey images, 3 for RGB.
        arguments: further arguments of the timm model.
        layers: path -> MoE part, a ``Branch`` behind a block or what replaces its MLP.
        mean, std: pixel statistics that the backbone was trained with, one value or one a channel.
        size: images are resized to this side in front of the backbone; None: taken as they are.

    Raises:
        UserError: timm is not installed; an unknown model or arguments that it refuses; a path without a block.

    >>> model = VisionMoE("vit_tiny_patch16_224", 10, channels=1, arguments={"img_size": 32, "depth": 2})
    >>> model(torch.rand(2, 1, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        channels: int = 3,
        arguments: Mapping[str, Any] | None = None,
        layers: Mapping[str, Any] | None = None,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.name, self.num_classes, self.channels, self.size = name, num_classes, channels, size
        self.arguments, self.mean, self.std = dict(arguments or {}), list(mean), list(std)
        self.backbone = _create(name, num_classes, channels, self.arguments)
        self.trained: tuple[str, ...] | None = None
        self.frozen: set[str] = set()
        for path, part in (layers or {}).items():
            _put(self.backbone, path, part)

    def spec_arguments(self) -> dict[str, object]:
        """The MoE parts as they are now."""
        return {"layers": {path: _described(part) for path, part in self.parts().items()}}

    def forward(self, images: Tensor) -> Tensor:
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        rows = torch.tensor([self.mean, self.std], dtype=images.dtype).to(images.device, non_blocking=True)
        mean, std = rows.view(2, -1, 1, 1)
        logits: Tensor = self.backbone((images - mean) / std)
        return logits

    def parts(self) -> dict[str, nn.Module]:
        """The MoE parts by their path in the backbone."""
        parts: dict[str, nn.Module] = {}
        for path, module in self.backbone.named_modules():
            inside = any(path.startswith(f"{outer}.") for outer in parts)
            if isinstance(module, Branch | Recordable) and not inside:
                parts[path] = module
        return parts

    def heads(self) -> list[nn.Module]:
        """The classifier; two of them in a distilled DeiT."""
        classifier = self.backbone.get_classifier()
        return list(classifier) if isinstance(classifier, tuple) else [classifier]

    def new_head(self, num_classes: int) -> None:
        """Put a fresh classifier in."""
        device = next(self.parameters()).device
        self.backbone.reset_classifier(num_classes)
        self.num_classes = num_classes
        self.to(device)

    def freeze(self, parts: Sequence[str] | None = None) -> None:
        """Train only the head and the MoE parts at the paths ``parts`` (None: all MoE parts).

        The rest gets no gradient and stays in evaluation mode while the network trains (dropout, drop path and the
        statistics of batch norms stand still), so it is the same function, bit by bit, before and after.
        """
        self.trained = tuple(self.parts() if parts is None else parts)
        trained_ids = {id(p) for part in self._trained() for p in part.parameters()}
        for name, parameter in self.named_parameters():
            if id(parameter) not in trained_ids and parameter.requires_grad:
                parameter.requires_grad_(False)
                self.frozen.add(name)
            elif id(parameter) in trained_ids and name in self.frozen:
                parameter.requires_grad_(True)
                self.frozen.discard(name)
        self.train(self.training)

    def train(self, mode: bool = True) -> VisionMoE:
        super().train(mode)
        if mode and self.trained is not None:
            self.backbone.eval()
            for part in self._trained():
                part.train()
        return self

    def _trained(self) -> list[nn.Module]:
        return [*(self.backbone.get_submodule(path) for path in self.trained or ()), *self.heads()]


def vision_moe(
    name: str,
    num_classes: int,
    *,
    channels: int = 3,
    arguments: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    size: int | None = None,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.5,),
) -> VisionMoE:
    """A ``VisionMoE`` without MoE parts yet.

    Args:
        pretrained: with timm's weights, and the pixel statistics that belong to them (``mean``, ``std`` are not used).

    Raises:
        UserError: as ``VisionMoE``; weights that cannot be fetched.
    """
    model = VisionMoE(name, num_classes, channels=channels, arguments=arguments, mean=mean, std=std, size=size)
    if pretrained:
        model.backbone = _fetch(name, num_classes, channels, model.arguments)
        known = model.backbone.pretrained_cfg
        for key in ("mean", "std"):
            values = list(known[key])
            setattr(model, key, values if channels == len(values) else [sum(values) / len(values)])
    return model


@torch.no_grad()
def check_images(model: VisionMoE, size: tuple[int, int]) -> None:
    """Try one black image of (H, W) = ``size``.

    Raises:
        UserError: the backbone refuses it, or gives something else than class logits.
    """
    mode = model.training
    device = next(model.parameters()).device
    height, width = size if model.size is None else (model.size, model.size)
    try:
        logits = model.eval()(torch.zeros(1, model.channels, *size, device=device))
    except Exception as error:  # the model's own code, and its own exceptions, AssertionError among them
        raise UserError(
            f"timm model {model.name!r} refuses images of {height} x {width} ({first_line(error)}); it needs another "
            "img_size in its arguments, or another image_size"
        ) from error
    finally:
        model.train(mode)
    if logits.shape != (1, model.num_classes):
        raise UserError(f"timm model {model.name!r} gives {list(logits.shape)} for an image, not class logits")


def _create(name: str, num_classes: int, channels: int, arguments: Mapping[str, Any]) -> Any:
    timm = _timm()
    if ":" in name or not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), 5, 0.5)
        raise UserError(
            f"unknown timm model {name!r}; {'near: ' + ', '.join(near) if near else 'see timm.list_models()'}"
        )
    for theirs, reason in OURS.items():
        if theirs in arguments:
            raise UserError(f"arguments of timm model {name!r}: {theirs} does not belong there; {reason}")
    try:
        return timm.create_model(name, num_classes=num_classes, in_chans=channels, **arguments)
    except Exception as error:
        raise UserError(f"timm model {name!r} refuses its arguments ({first_line(error)})") from error


def _fetch(name: str, num_classes: int, channels: int, arguments: Mapping[str, Any]) -> Any:
    """The model with timm's weights; its arguments are known to be good."""
    timm, cure = _timm(), "give a local file as checkpoint, or leave pretrained out"
    if not timm.is_model_pretrained(name):
        raise UserError(f"timm has no weights of {name!r}; {cure}")
    try:
        return timm.create_model(name, pretrained=True, num_classes=num_classes, in_chans=channels, **arguments)
    except RuntimeError as error:
        raise UserError(f"the weights of {name!r} do not fit its arguments ({first_line(error)}); {cure}") from error
    except Exception as error:
        raise UserError(f"the weights of {name!r} could not be fetched ({first_line(error)}); {cure}") from error


def _put(backbone: nn.Module, path: str, part: Any) -> None:
    block = path.rpartition(".")[0]
    try:
        if isinstance(part, Branch):
            put_branch(block, backbone.get_submodule(block), part)
        else:
            layer = part.layer(backbone.get_submodule(path)) if isinstance(part, MlpCopies) else part
            put_layer(backbone, path, layer)
    except (AttributeError, TypeError) as error:
        raise UserError(f"{type(backbone).__name__} has no place {path!r} for an MoE part") from error


def _described(part: nn.Module) -> Any:
    if isinstance(part, MoE) and isinstance(part.experts, ModuleExperts):
        return MlpCopies(part.router, part.experts.num_experts, part.placement, part.memory)
    return part


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise UserError("this needs timm; install it with 'pip install spectralmoe[vision]'") from error
    return timm

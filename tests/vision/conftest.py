"""Tiny timm models of all families, with random weights everywhere (timm starts layer scales near zero)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from spectralmoe import LinearScorer, Router, Selector, Soft, TopK

timm = pytest.importorskip("timm")

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
EVA = {**VIT, "embed_dim": 32}
STAGES = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
SWIN = {"img_size": 32, "patch_size": 4, "window_size": 2, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 2)}
HIERA = {"img_size": (32, 32), "embed_dim": 16, "stages": (1, 2), "num_heads": 2, "q_pool": 1, "mask_unit_size": (4, 4)}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "deit3": ("deit3_small_patch16_224", VIT),
    "dinov2_reg": ("vit_small_patch14_reg4_dinov2", VIT),
    "clip": ("vit_base_patch32_clip_224", VIT),
    "siglip": ("vit_base_patch16_siglip_224", VIT),
    "dinov3": ("vit_small_patch16_dinov3", EVA),
    "eva02": ("eva02_base_patch14_224", EVA),  # SwiGLU with an inner norm
    "beit": ("beit_base_patch16_224", VIT),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "hiera": ("hiera_tiny_224", HIERA),
    "convnext": ("convnext_tiny", STAGES),  # its MLP sees NHWC
    "convnext_atto": ("convnext_atto", STAGES),  # its MLP is of 1x1 convolutions
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "eva02_glu": ("eva02_tiny_patch14_224", EVA),
    "dinov2_swiglu": ("vit_giant_patch14_reg4_dinov2", VIT),
    "clip_quickgelu": ("vit_base_patch32_clip_quickgelu_224", VIT),
    "siglip_tanh": ("vit_base_patch16_siglip_224", {**VIT, "act_layer": "gelu_tanh"}),
    "convnextv2": ("convnextv2_tiny", STAGES),
    "convnextv2_atto": ("convnextv2_atto", STAGES),
    "pvt_v2": ("pvt_v2_b0", {"depths": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2)}),
    "cait": ("cait_xxs24_224", {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}),
    "xcit": ("xcit_nano_12_p16_224", {"img_size": 32, "embed_dim": 32, "depth": 2}),
    "poolformer": ("poolformer_s12", {}),
    "resnet": ("resnet18", {}),
    "vit_parallel": ("vit_base_patch16_xp_224", VIT),
}


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each family that the branches must leave as it is."""
    return str(request.param)


@pytest.fixture(scope="session")
def make_vision() -> Callable[..., nn.Module]:
    """``make_vision(family, **more)``: a tiny timm model in evaluation mode with 5 classes, moved off its start."""

    def make(family: str, **more: Any) -> nn.Module:
        name, arguments = (FAMILIES | OTHERS)[family]
        model = timm.create_model(name, **{**arguments, "num_classes": 5, **more}).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model

    return make


@pytest.fixture(scope="session")
def top() -> Callable[..., Any]:
    """``top(k, normalize=False)``: a router factory, linear with top-k (None: soft)."""

    def factory(k: int | None = None, *, normalize: bool = False) -> Any:
        def selector() -> Selector:
            return Soft(normalize=normalize) if k is None else TopK(k, normalize=normalize)

        return lambda dim, experts: Router(LinearScorer(dim, experts), selector())

    return factory


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)

"""Small MoE layers and routers inside Megatron-core."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from seeds import generator
from torch import Tensor

from spectralmoe.integrations.megatron import SpectralRouter

__all__ = ["DIM", "EXPERTS", "SCALE", "B", "K", "S", "config", "layer_with", "padding", "router_of", "tokens"]

DIM, EXPERTS, K, S, B = 12, 6, 2, 5, 3
SCALE = 0.5
"""Of Megatron's auxiliary losses."""


def config(**settings: Any) -> TransformerConfig:
    sizes = {"num_layers": 2, "hidden_size": DIM, "num_attention_heads": 2, "num_moe_experts": EXPERTS}
    plain = {"moe_router_topk": K, "use_cpu_initialization": True, "add_bias_linear": False}
    return TransformerConfig(**sizes, **plain, **{"moe_token_dispatcher_type": "allgather", **settings})


def layer_with(row: Any, **settings: Any) -> Any:
    """Megatron's MoE layer with the router of ``row``; with its own for None."""
    spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
    if row is not None:
        spec.submodules.router = SpectralRouter.configure(row)
    layer = build_module(spec, config=config(**settings), layer_number=1)
    layer.set_layer_number(1)
    return layer


def router_of(row: Any, **settings: Any) -> SpectralRouter:
    return SpectralRouter.configure(row)(config=config(**settings), pg_collection=get_default_pg_collection())


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(S, B, DIM, generator=generator(seed))


def padding() -> Tensor:
    """(B, S), True for padding, as ``MoELayer`` gets it."""
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[1, 3:] = mask[2, 1:] = True
    return mask

"""Tiny Hugging Face models with MoE: two layers or so of width 32, random weights, all that the tests run on a CPU.

``FAMILIES[name]()`` builds one in evaluation mode, always with the same weights. Nothing is fetched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from seeds import generator, shifted
from torch import nn

__all__ = ["ELEVEN", "FAMILIES", "MORE", "batch", "build"]

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT: dict[str, Any] = {  # multi-head latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}

SPECS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**SIZES, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2_moe": (  # layer 1 is dense
        "Qwen2Moe",
        {
            **SIZES,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe": (  # every second layer is dense
        "Qwen3Moe",
        {
            **SIZES,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": ("Olmoe", {**SIZES, "num_experts": 8, "num_experts_per_tok": 2}),
    "deepseek_v3": (  # the first layer is dense
        "DeepseekV3",
        {
            **SIZES,
            **LATENT,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            **SIZES,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "llama4": (  # one layer in two is dense
        "Llama4",
        {
            **SIZES,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 40,
            "interleave_moe_layer_step": 2,
        },
    ),
    "granitemoe": ("GraniteMoe", {**SIZES, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "switch": (  # every second layer of either stack is dense
        "SwitchTransformers",
        {
            "vocab_size": 260,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 4,
            "num_decoder_layers": 4,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 2,
            "num_heads": 4,
            "num_experts": 8,
            "expert_capacity": 64,
            "dropout_rate": 0.0,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        },
    ),
}

MORE: dict[str, tuple[str, dict[str, Any]]] = {  # the first layer is dense
    "glm4_moe": (
        "Glm4Moe",
        {
            **SIZES,
            "head_dim": 8,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {**SIZES, "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
    ),
}

MODELS = {"Llama4": "Llama4ForCausalLM", "SwitchTransformers": "SwitchTransformersForConditionalGeneration"}
CONFIGS = {"Llama4": "Llama4TextConfig"}


def build(name: str, **changes: Any) -> Any:
    """The tiny model of family ``name``, with changes to its config; every weight is random (biases too)."""
    import transformers

    prefix, arguments = {**SPECS, **MORE}[name]
    config = getattr(transformers, CONFIGS.get(prefix, f"{prefix}Config"))(**{**arguments, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(shifted(0))
        model = getattr(transformers, MODELS.get(prefix, f"{prefix}ForCausalLM"))(config).eval()
        with torch.no_grad():
            for tensor in [*model.parameters(), *_buffers(model)]:
                tensor += 0.1 * torch.randn_like(tensor)
    return model


@functools.cache
def stock_of(name: str) -> Any:
    """The tiny model of family ``name`` for tests that do not change it."""
    return build(name)


def left_padded(model: Any) -> dict[str, torch.Tensor]:
    """A batch with an attention mask; its second row has 7 tokens of padding on the left."""
    inputs = batch(model)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :7] = 0
    return {**inputs, "attention_mask": mask}


def _buffers(model: nn.Module) -> list[torch.Tensor]:
    """Buffers that are weights in all but name: the correction bias of a router."""
    return [tensor for name, tensor in model.named_buffers() if name.endswith("correction_bias")]


def batch(model: Any, rows: int = 2, length: int = 24, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random input ids for ``model``, without the special ones; for a decoder beside an encoder too."""
    make = generator(seed)
    size = model.config.vocab_size
    found = {"input_ids": torch.randint(4, size, (rows, length), generator=make)}
    if model.config.is_encoder_decoder:
        found["decoder_input_ids"] = torch.randint(4, size, (rows, length - 4), generator=make)
    return found


FAMILIES: dict[str, Callable[[], Any]] = {name: (lambda name=name: build(name)) for name in SPECS}
"""The nine families: name -> a function that builds the tiny model. ``build`` knows those of ``MORE``, too."""

ELEVEN = (*FAMILIES, *MORE)

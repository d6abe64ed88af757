"""Tiny dense language models of transformers: three layers of width 32, random weights. Nothing is fetched."""

from __future__ import annotations

from typing import Any

import torch
from seeds import generator, shifted
from torch import Tensor

__all__ = ["DENSE", "dense_model", "ids"]

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ROPE = {"rope_type": "default", "rope_theta": 500.0}

DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rms_norm_eps": 1e-3, "head_dim": 16, "rope_parameters": ROPE}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral_window": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "attention_bias": False}),
    "qwen3_window": ("Qwen3", {"head_dim": 8, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}),
}
"""Name -> class and settings that differ from the families' usual ones."""


def dense_model(name: str, **changes: Any) -> tuple[Any, Tensor]:
    """The model called ``name`` in evaluation mode, every weight random, and its logits of ``ids()``."""
    import transformers

    family, settings = DENSE[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **settings, **changes})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(shifted(0))
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        for value in model.parameters():
            value += 0.1 * torch.randn_like(value)
        model.generation_config.max_length = 77
        return model, model(ids()).logits


def ids(rows: int = 2, length: int = 24) -> Tensor:
    """Random token ids, longer than the windows of ``DENSE``."""
    return torch.randint(4, 260, (rows, length), generator=generator(5))

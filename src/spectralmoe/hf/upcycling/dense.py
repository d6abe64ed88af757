"""The dense language model that is upcycled: what it is made of, and what a config of its kind must say."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectralmoe.checkpoints.config import experts_of_config
from spectralmoe.diagnostics.watch import Watched
from spectralmoe.errors import UserError
from spectralmoe.hf.load import import_transformers

__all__ = ["OTHERS", "Dense", "Mlp", "admit_dense", "read_dense"]

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""``model_type`` of a config -> the class in transformers: pre-norm decoders with gated MLPs without biases."""

_COMMON = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
)

OTHERS = "for other models there is spectralmoe.vision.replace_mlp, which puts experts of this library in place of MLPs"


class Mlp(NamedTuple):
    """The matrices of a gated MLP, W_down(act(W_gate x) * W_up x): gate and up (F, D), down (D, F)."""

    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True)
class Dense:
    """A dense causal language model of transformers.

    Attributes:
        model: the model itself, which nothing here changes.
        depth, width, hidden: number of layers L, width D, hidden width F of the MLPs.
        qkv_bias, output_bias: whether attention has biases at its inputs, at its output.
        qk_norm: whether queries and keys are normalised.
        windowed: the layers with a sliding window.
    """

    model: Any
    depth: int
    width: int
    hidden: int
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    windowed: frozenset[int]

    @property
    def window(self) -> int | None:
        """Tokens that a layer with a sliding window sees; None where there is no such layer."""
        return int(self.model.config.sliding_window) if self.windowed else None

    def common(self) -> dict[str, Any]:
        """The settings that every family of decoders has under one name."""
        config = self.model.config
        settings = {name: copy.deepcopy(getattr(config, name)) for name in _COMMON}
        heads = config.num_attention_heads
        return {**settings, "head_dim": getattr(config, "head_dim", None) or self.width // heads}

    def mlp(self, layer: int) -> Mlp:
        """The matrices of a layer's MLP."""
        mlp = self.model.model.layers[layer].mlp
        return Mlp(*(part.weight.detach() for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)))


def read_dense(model: Any) -> Dense:
    """What ``model`` is made of.

    Raises:
        UserError: it has experts already; it is of another family, or no causal language model; its weights are
            quantised, or its MLPs have biases.
    """
    config: Any = getattr(model, "config", None)
    kind = type(model).__name__
    settings: Mapping[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
    if counts := experts_of_config(settings):
        count = next(iter(counts.values()))
        raise UserError(f"{kind} has {count} experts already; upcycle makes experts of a dense model")
    family = FAMILIES.get(str(settings.get("model_type")))
    if family is None:
        raise UserError(f"{kind} cannot become a stock MoE: upcycle knows {', '.join(FAMILIES)}; {OTHERS}")
    if not isinstance(model, getattr(import_transformers(), family)):
        raise UserError(f"{kind} is no {family}: upcycle takes the causal language model itself, without adapters")
    first = model.model.layers[0]
    attention, mlp = first.self_attn, first.mlp
    if mlp.gate_proj.bias is not None:
        raise UserError(f"{kind}: its MLPs have biases (mlp_bias), which the experts of no stock MoE have; {OTHERS}")
    dense = Dense(
        model=model,
        depth=len(model.model.layers),
        width=config.hidden_size,
        hidden=config.intermediate_size,
        qkv_bias=attention.q_proj.bias is not None,
        output_bias=attention.o_proj.bias is not None,
        qk_norm=hasattr(attention, "q_norm"),
        windowed=_windowed(config),
    )
    gate = dense.mlp(0).gate
    if not gate.is_floating_point() or gate.shape != torch.Size([dense.hidden, dense.width]):
        raise UserError(f"{kind}: its weights are quantised; load it without quantisation, or dequantise it first")
    return dense


def admit_dense(model: Any) -> list[Watched]:
    """For ``load_transformers``: refuses what cannot be upcycled, and gives the MoE layers of the rest, none."""
    read_dense(model)
    return []


def _windowed(config: Any) -> frozenset[int]:
    if getattr(config, "sliding_window", None) is None:
        return frozenset()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return frozenset(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")

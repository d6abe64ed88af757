"""Qwen2-MoE: any layers have experts, with a shared expert beside them; attention may have biases at its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectralmoe.hf.upcycling.dense import Dense, Mlp
from spectralmoe.hf.upcycling.plan import Plan
from spectralmoe.hf.upcycling.targets.base import Target

__all__ = ["Qwen2Moe"]


class Qwen2Moe(Target):
    """Qwen2-MoE's layout (Yang et al., "Qwen2 Technical Report", arXiv 2407.10671).

    The shared expert is as wide as a routed one and starts with a down projection of zeros: it adds nothing at step 0.
    """

    config = "Qwen2MoeConfig"

    def refusal(self, dense: Dense, plan: Plan) -> str | None:
        if dense.output_bias:
            return "its attention has no bias at its output"
        return "it does not normalise queries and keys" if dense.qk_norm else None

    def settings(self, dense: Dense, plan: Plan) -> dict[str, Any]:
        width = dense.hidden // plan.granularity
        kinds = ["sliding_attention" if layer in dense.windowed else "full_attention" for layer in range(dense.depth)]
        return {
            "intermediate_size": dense.hidden,
            "moe_intermediate_size": width,
            "shared_expert_intermediate_size": width,
            "num_experts": plan.experts,
            "num_experts_per_tok": plan.k,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer in range(dense.depth) if layer not in plan.layers],
            "qkv_bias": dense.qkv_bias,
            "use_sliding_window": bool(dense.windowed),
            "sliding_window": dense.window,
            "layer_types": kinds,
        }

    def more(self, plan: Plan, mlp: Mlp) -> dict[str, Tensor]:
        return {
            "shared_expert.gate_proj.weight": mlp.gate.clone(),
            "shared_expert.up_proj.weight": mlp.up.clone(),
            "shared_expert.down_proj.weight": torch.zeros_like(mlp.down),
            "shared_expert_gate.weight": mlp.gate.new_zeros(1, mlp.gate.shape[1]),
        }

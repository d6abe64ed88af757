"""GLM4-MoE: sigmoid scores with a correction bias, a shared expert; the first layers may be dense."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectralmoe.hf.upcycling.dense import Dense, Mlp
from spectralmoe.hf.upcycling.plan import Plan
from spectralmoe.hf.upcycling.targets.base import Target

__all__ = ["Glm4Moe"]


class Glm4Moe(Target):
    """GLM4-MoE's layout (GLM-4.5 Team, "GLM-4.5: Agentic, Reasoning, and Coding (ARC) Foundation Models", arXiv
    2508.06471).

    Its bias of the choice lets the load be balanced without a loss. The shared expert is as wide as a routed one and
    starts with a down projection of zeros.
    """

    config = "Glm4MoeConfig"

    def refusal(self, dense: Dense, plan: Plan) -> str | None:
        if dense.output_bias:
            return "its attention has no bias at its output"
        if dense.windowed:
            return "it has no sliding window"
        last = range(dense.depth - len(plan.layers), dense.depth)
        return None if plan.layers == tuple(last) else "its dense layers come first, then those with experts"

    def settings(self, dense: Dense, plan: Plan) -> dict[str, Any]:
        common = dense.common()
        return {
            "rope_parameters": {**common["rope_parameters"], "partial_rotary_factor": 1.0},
            "partial_rotary_factor": 1.0,
            "intermediate_size": dense.hidden,
            "moe_intermediate_size": dense.hidden // plan.granularity,
            "n_routed_experts": plan.experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": plan.k,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": dense.depth - len(plan.layers),
            "attention_bias": dense.qkv_bias,
            "use_qk_norm": dense.qk_norm,
            "num_mtp_layers": 0,
        }

    def more(self, plan: Plan, mlp: Mlp) -> dict[str, Tensor]:
        return {
            "shared_experts.gate_proj.weight": mlp.gate.clone(),
            "shared_experts.up_proj.weight": mlp.up.clone(),
            "shared_experts.down_proj.weight": torch.zeros_like(mlp.down),
            "gate.e_score_correction_bias": torch.zeros(plan.experts, device=mlp.gate.device),
        }

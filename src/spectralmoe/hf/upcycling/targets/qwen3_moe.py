"""Qwen3-MoE: any layers have experts; normalised queries and keys."""

from __future__ import annotations

from typing import Any

from spectralmoe.hf.upcycling.dense import Dense
from spectralmoe.hf.upcycling.plan import Plan
from spectralmoe.hf.upcycling.targets.base import Target

__all__ = ["Qwen3Moe"]


class Qwen3Moe(Target):
    """Qwen3-MoE's layout (Qwen Team, "Qwen3 Technical Report", arXiv 2505.09388)."""

    config = "Qwen3MoeConfig"

    def refusal(self, dense: Dense, plan: Plan) -> str | None:
        if not dense.qk_norm:
            return "it normalises queries and keys"
        if dense.qkv_bias != dense.output_bias:
            return "its attention has biases at its inputs and its output, or at neither"
        return None if len(dense.windowed) in (0, dense.depth) else "its sliding window is in all layers or in none"

    def settings(self, dense: Dense, plan: Plan) -> dict[str, Any]:
        return {
            "intermediate_size": dense.hidden,
            "moe_intermediate_size": dense.hidden // plan.granularity,
            "num_experts": plan.experts,
            "num_experts_per_tok": plan.k,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer in range(dense.depth) if layer not in plan.layers],
            "attention_bias": dense.qkv_bias,
            "use_sliding_window": bool(dense.windowed),
            "sliding_window": dense.window,
        }

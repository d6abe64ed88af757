"""Mixtral: all layers have experts; attention without biases."""

from __future__ import annotations

from typing import Any

from spectralmoe.hf.upcycling.dense import Dense
from spectralmoe.hf.upcycling.plan import Plan
from spectralmoe.hf.upcycling.targets.base import Target

__all__ = ["Mixtral"]


class Mixtral(Target):
    """Mixtral's layout (Jiang et al., "Mixtral of Experts", arXiv 2401.04088)."""

    config = "MixtralConfig"

    def refusal(self, dense: Dense, plan: Plan) -> str | None:
        if dense.qkv_bias or dense.output_bias:
            return "its attention has no biases"
        if dense.qk_norm:
            return "it does not normalise queries and keys"
        if len(dense.windowed) not in (0, dense.depth):
            return "its sliding window is in all layers or in none"
        return None if len(plan.layers) == dense.depth else "all of its layers have experts"

    def settings(self, dense: Dense, plan: Plan) -> dict[str, Any]:
        return {
            "intermediate_size": dense.hidden // plan.granularity,
            "num_local_experts": plan.experts,
            "num_experts_per_tok": plan.k,
            "sliding_window": dense.window,
        }

"""transformers' Mixtral and Qwen3-MoE blocks, with each of its ways to run the experts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spectralmoe.bench.problem import Problem
from spectralmoe.bench.subject import Skipped, Subject

__all__ = ["subjects"]

WAYS = ("eager", "grouped_mm", "batched_mm")
GPU_WAYS = ("sonicmoe", "deepgemm")


def subjects(problem: Problem) -> Iterator[Subject | Skipped]:
    """Both blocks in all ways; their experts are SwiGLU."""
    from transformers import MixtralConfig, Qwen3MoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    if problem.activation != "swiglu":
        yield Skipped("transformers", "its experts are SwiGLU: see the swiglu cases")
        return
    sizes = problem.sizes
    mixtral = MixtralConfig(
        hidden_size=sizes.d, intermediate_size=sizes.h, num_local_experts=sizes.e, num_experts_per_tok=sizes.k
    )
    qwen = Qwen3MoeConfig(
        hidden_size=sizes.d,
        moe_intermediate_size=sizes.h,
        num_experts=sizes.e,
        num_experts_per_tok=sizes.k,
        norm_topk_prob=True,
    )
    blocks: dict[str, tuple[Any, Any]] = {
        "Mixtral": (MixtralSparseMoeBlock, mixtral),
        "Qwen3-MoE": (Qwen3MoeSparseMoeBlock, qwen),
    }
    for way in (*WAYS, *(GPU_WAYS if problem.device.type == "cuda" else ())):
        for family, (block, config) in blocks.items():
            name = f"transformers {family} {way}"
            if way == "batched_mm" and (needed := _copied_bytes(problem)) > _memory(problem.device) / 4:
                yield Skipped(name, f"gathers a copy of the weights for every slot: {needed / 2**30:.0f} GiB a pass")
            else:
                yield _subject(name, block, config, way, problem)


def _subject(name: str, block: Any, config: Any, way: str, problem: Problem) -> Subject:
    variant = type(config).from_dict(config.to_dict())
    variant._experts_implementation = way
    with torch.device("meta"):
        layer: nn.Module = block(variant)
    gate: Any = layer.gate
    experts: Any = layer.experts
    gate.weight = nn.Parameter(problem.router.to(problem.dtype))
    experts.gate_up_proj, experts.down_proj = nn.Parameter(problem.up), nn.Parameter(problem.down)

    def gradients() -> dict[str, Tensor | None]:
        return {"router": gate.weight.grad, "up": experts.gate_up_proj.grad, "down": experts.down_proj.grad}

    return Subject(name, layer, lambda x: layer(x[None])[0], gradients)


def _copied_bytes(problem: Problem) -> int:
    """Of one copy of an expert for each slot."""
    sizes = problem.sizes
    return sizes.n * sizes.k * 3 * sizes.h * sizes.d * problem.up.element_size()


def _memory(device: torch.device) -> int:
    """Bytes of memory, of the machine or of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

"""megablocks: dropless MoE on a GPU (Gale et al., arXiv 2211.15841)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.bench.problem import Problem
from spectralmoe.bench.subject import Skipped, Subject

__all__ = ["subjects"]


def subjects(problem: Problem) -> Iterator[Subject | Skipped]:
    """Its dMoE with grouped GEMMs, in half precision."""
    if problem.device.type != "cuda":
        yield Skipped("megablocks", "runs on a GPU only")
        return
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE

    sizes, gated = problem.sizes, problem.activation == "swiglu"
    layer = dMoE(
        Arguments(
            hidden_size=sizes.d,
            ffn_hidden_size=sizes.h,
            bias=False,
            return_bias=False,
            activation_fn=F.silu if gated else F.gelu,
            moe_num_experts=sizes.e,
            moe_top_k=sizes.k,
            moe_normalize_expert_weights=1,
            moe_loss_weight=0.0,
            mlp_type="glu" if gated else "mlp",
            mlp_impl="grouped",
            fp16=problem.dtype == torch.float16,
            bf16=problem.dtype == torch.bfloat16,
            device=problem.device,
        )
    )
    gate, mlp = layer.router.layer, layer.experts.mlp
    gate.weight = nn.Parameter(problem.router.to(problem.dtype))
    names = ("w1", "v1") if gated else ("w1",)
    for name, half in zip(names, problem.up.chunk(len(names), 1), strict=True):
        setattr(mlp, name, nn.Parameter(half.flatten(0, 1).contiguous()))
    mlp.w2 = nn.Parameter(problem.down.mT.flatten(0, 1).contiguous())

    def gradients() -> dict[str, Tensor | None]:
        up = torch.cat([getattr(mlp, name).grad.unflatten(0, (sizes.e, -1)) for name in names], 1)
        return {"router": gate.weight.grad, "up": up, "down": mlp.w2.grad.unflatten(0, (sizes.e, -1)).mT}

    yield Subject("megablocks", layer, lambda x: layer(x[None])[0], gradients)

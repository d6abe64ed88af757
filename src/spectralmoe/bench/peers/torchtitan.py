"""torchtitan's MoE, if it imports here. Its experts compute in bf16 whatever they are given."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from spectralmoe.bench.problem import Problem
from spectralmoe.bench.subject import Skipped, Subject

__all__ = ["subjects"]


def subjects(problem: Problem) -> Iterator[Subject | Skipped]:
    """The layer for one device, softmax scores, renormalised; its experts are SwiGLU."""
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    if problem.activation != "swiglu" or problem.dtype != torch.bfloat16:
        yield Skipped("torchtitan", "its experts are SwiGLU and compute in bf16: see those cases")
        return
    sizes = problem.sizes
    experts = GroupedExperts.Config(dim=sizes.d, hidden_dim=sizes.h, num_experts=sizes.e)
    dispatcher = LocalTokenDispatcher.Config(num_experts=sizes.e, top_k=sizes.k)
    router = TokenChoiceTopKRouter.Config(
        num_experts=sizes.e,
        gate=Linear.Config(in_features=sizes.d, out_features=sizes.e),
        top_k=sizes.k,
        score_func="softmax",
        route_norm=True,
    )
    config = MoE.Config(
        num_experts=sizes.e,
        routed_experts=RoutedExperts.Config(inner_experts=experts, token_dispatcher=dispatcher),
        router=router,
        load_balance_coeff=None,
    )
    with torch.device("meta"):
        layer = config.build()
    layer.tokens_per_expert_E = torch.zeros(sizes.e, device=problem.device)
    gate, inner = layer.router.gate, layer.routed_experts.inner_experts
    gate.weight = nn.Parameter(problem.router.to(problem.dtype))
    first, second = problem.up.chunk(2, 1)
    inner.w1_EFD, inner.w3_EFD = nn.Parameter(first.contiguous()), nn.Parameter(second.contiguous())
    inner.w2_EDF = nn.Parameter(problem.down)

    def gradients() -> dict[str, Tensor | None]:
        up = torch.cat([inner.w1_EFD.grad, inner.w3_EFD.grad], 1)
        return {"router": gate.weight.grad, "up": up, "down": inner.w2_EDF.grad}

    yield Subject("torchtitan", layer, lambda x: layer(x[None])[0], gradients)

"""mixture-of-experts: top-2 with a capacity (Shazeer et al., arXiv 1701.06538; GShard, arXiv 2006.16668)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from spectralmoe.bench.peers.st_moe import GROUP
from spectralmoe.bench.problem import Problem
from spectralmoe.bench.subject import Skipped, Subject

__all__ = ["subjects"]


def subjects(problem: Problem) -> Iterator[Subject | Skipped]:
    """Its layer with GELU experts of the problem's widths; both experts of a token always asked for."""
    from mixture_of_experts import MoE

    sizes, length = problem.sizes, min(problem.sizes.n, GROUP)
    if problem.activation != "gelu" or sizes.k != 2 or sizes.n % length:
        yield Skipped(
            "mixture-of-experts", f"top-2 with plain experts: see the gelu cases with k = 2 and {GROUP} tokens or more"
        )
        return
    with torch.device(problem.device):
        layer = MoE(
            sizes.d,
            num_experts=sizes.e,
            hidden_dim=sizes.h,
            activation=nn.GELU,
            second_policy_train="all",
            second_policy_eval="all",
        )
    layer.to(problem.dtype)
    note = f"capacity, tokens beyond it dropped; sequences of {length}"
    yield Subject(
        "mixture-of-experts", layer, lambda x: layer(x.view(-1, length, sizes.d))[0].flatten(0, 1), None, "unlike", note
    )

"""st-moe-pytorch: top-k above a threshold drawn at random, with a capacity (Zoph et al., arXiv 2202.08906)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spectralmoe.bench.problem import Problem
from spectralmoe.bench.subject import Skipped, Subject

__all__ = ["GROUP", "subjects"]

GROUP = 512
"""Tokens of one sequence: its dispatch masks grow with the square of them."""


def subjects(problem: Problem) -> Iterator[Subject | Skipped]:
    """Its layer with GEGLU experts of the problem's widths."""
    from st_moe_pytorch import MoE

    if problem.activation != "swiglu":
        yield Skipped("st-moe-pytorch", "its experts have gates (GEGLU): see the swiglu cases")
        return
    sizes, length = problem.sizes, min(problem.sizes.n, GROUP)
    if sizes.k < 2 or sizes.n % length:
        yield Skipped("st-moe-pytorch", f"needs k of at least 2 and a multiple of {GROUP} tokens")
        return
    with torch.device(problem.device):
        layer = MoE(sizes.d, num_experts=sizes.e, gating_top_n=sizes.k, expert_hidden_mult=1.5 * sizes.h / sizes.d)
    layer.to(problem.dtype)
    note = f"GEGLU with biases, random threshold, capacity; sequences of {length}"

    def call(x: Tensor) -> Tensor:
        y: Tensor = layer(x.view(-1, length, sizes.d)).outputs
        return y.flatten(0, 1)

    yield Subject("st-moe-pytorch", layer, call, None, "unlike", note)

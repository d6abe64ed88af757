"""soft-moe: slots that are mixtures of all tokens (Puigcerver et al., arXiv 2308.00951)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from spectralmoe.bench.peers.st_moe import GROUP
from spectralmoe.bench.problem import Problem
from spectralmoe.bench.subject import Skipped, Subject

__all__ = ["subjects"]


def subjects(problem: Problem) -> Iterator[Subject | Skipped]:
    """Its layer with GELU experts of the problem's widths, and as many slots as the problem fills."""
    from soft_moe import SoftMoELayerWrapper

    sizes, length = problem.sizes, min(problem.sizes.n, GROUP)
    if problem.activation != "gelu" or sizes.n % length:
        yield Skipped("soft-moe", f"plain experts: see the gelu cases of {GROUP} tokens or more")
        return

    def expert() -> nn.Module:
        first, second = nn.Linear(sizes.d, sizes.h, bias=False), nn.Linear(sizes.h, sizes.d, bias=False)
        return nn.Sequential(first, nn.GELU(), second)

    slots = max(sizes.k * length // sizes.e, 1)
    with torch.device(problem.device):
        layer = SoftMoELayerWrapper(sizes.d, sizes.e, slots, expert)
    layer.to(problem.dtype)
    note = f"soft slots, {slots} an expert; sequences of {length}"
    yield Subject("soft-moe", layer, lambda x: layer(x.view(-1, length, sizes.d)).flatten(0, 1), None, "unlike", note)

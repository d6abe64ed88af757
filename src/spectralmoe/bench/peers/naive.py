"""All experts on all tokens, with weight 0 where an expert was not chosen: E / k times the arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.bench.problem import Problem
from spectralmoe.bench.subject import Skipped, Subject

__all__ = ["subjects"]

MOST = 16


class Naive(nn.Module):
    """Plain torch, three einsums."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.k, self.gated = problem.sizes.k, problem.activation == "swiglu"
        self.router = nn.Parameter(problem.router.to(problem.dtype))
        self.up, self.down = nn.Parameter(problem.up), nn.Parameter(problem.down)

    def forward(self, x: Tensor) -> Tensor:
        best = F.linear(x, self.router).float().softmax(-1).topk(self.k)
        chosen = best.values / best.values.sum(-1, keepdim=True) if self.k > 1 else best.values
        weights = torch.zeros(len(x), len(self.router), device=x.device).scatter(1, best.indices, chosen).to(x.dtype)
        h = torch.einsum("nd,ehd->enh", x, self.up)
        if self.gated:
            gate, value = h.chunk(2, -1)
            h = F.silu(gate) * value
        else:
            h = F.gelu(h)
        return torch.einsum("end,ne->nd", torch.einsum("enh,edh->end", h, self.down), weights)


def subjects(problem: Problem) -> Iterator[Subject | Skipped]:
    """The naive form, where it is not hopeless."""
    more = problem.sizes.e / problem.sizes.k
    if more > MOST:
        yield Skipped("naive", f"does {more:.0f} times the arithmetic")
        return
    layer = Naive(problem)
    grads = {"router": layer.router, "up": layer.up, "down": layer.down}
    yield Subject("naive", layer, layer, lambda: {name: weight.grad for name, weight in grads.items()})

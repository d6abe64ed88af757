"""How firm a router's choice is: the share of tokens that a little noise sends elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.errors import UserError
from spectralmoe.router import Router

__all__ = ["changed_by_noise"]


@torch.no_grad()
def changed_by_noise(router: Router, x: Tensor, *, noise: float = 0.05, seed: int = 0) -> float:
    r"""Share of tokens whose set of chosen experts changes for :math:`x + \nu\,\|x\|\,u`, u uniform on the sphere.

    Args:
        x: tokens (N, D).
        noise: nu, the length of the step in units of the token's own norm.

    Returns:
        0 to 1; nan without tokens.

    Raises:
        UserError: a negative noise.

    >>> from spectralmoe import LinearScorer, TopK
    >>> router = Router(LinearScorer(8, 4), TopK(1))
    >>> changed_by_noise(router, torch.randn(100, 8), noise=0.0)
    0.0
    """
    if not noise >= 0:
        raise UserError(f"changed_by_noise: noise must not be negative, got {noise}")
    if not len(x):
        return float("nan")
    draw = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    step = noise * x.norm(dim=-1, keepdim=True) * F.normalize(draw, dim=-1).to(x)
    before, after = (router(tokens).indices.sort(-1).values for tokens in (x, x + step))
    return float((before != after).any(-1).double().mean())

"""Prototype gate: a token is scored by its squared distance to one learned point of each expert.

Delibasoglu, "Spectral Manifold Regularization for Stable and Modular Routing in Deep MoE Architectures" (SR-MoE),
arXiv 2601.03889, section on routing. No public code. The routing formula is the paper's. The paper gives neither the
temperature nor the prototypes' start: here they start at norm about 1, at which tokens that leave a LayerNorm spread
over the experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.context import Rows
from spectralmoe.errors import UserError
from spectralmoe.linalg import sigma_max
from spectralmoe.scorers.base import Scorer, gamma
from spectralmoe.sharding import full
from spectralmoe.torch_private import transforming

__all__ = ["PrototypeScorer"]


class PrototypeScorer(Scorer):
    r"""Scores a token by its squared distance to a learned prototype of each expert: :math:`-\|c x - \mu_i\|^2 / \tau`.

    The prototypes mu are (E, D). Up to the shift :math:`-\|c x\|^2/\tau`, which is common to all experts, this is a
    linear gate with weight :math:`2 c \mu_i/\tau` and bias :math:`-\|\mu_i\|^2/\tau` (``affine()``), so the softmax of
    the logits is :math:`c\,\sigma_1(\mu)/\tau`-Lipschitz. A softmax does not see the shift; sigmoid scores do, and
    underflow for wide tokens, so use softmax scores with this scorer. In fp32 the shift costs the differences of logits
    about :math:`10^{-7} \|c x\|^2/\tau` in precision, so put a normalisation in front of the layer.

    Args:
        temperature: tau > 0, fixed. If it were learned, it could undo a penalty on the prototypes' norm.
        scale: c > 0. With 1/sqrt(D), tokens that leave a normalisation get the prototypes' norm, about 1.

    Raises:
        UserError: temperature or scale is not positive.

    >>> scorer = PrototypeScorer(16, 4)
    >>> x = torch.randn(5, 16)
    >>> torch.allclose(scorer(x), -torch.cdist(x, scorer.prototypes) ** 2, atol=1e-4)
    True
    """

    rows = ("prototypes",)

    def __init__(self, dim: int, num_experts: int, *, temperature: float = 1.0, scale: float = 1.0) -> None:
        super().__init__(dim, num_experts)
        if not 0 < temperature < float("inf"):
            raise UserError(f"PrototypeScorer: temperature must be positive, got {temperature}")
        if not 0 < scale < float("inf"):
            raise UserError(f"PrototypeScorer: scale must be positive, got {scale}")
        self.temperature, self.scale = temperature, scale
        self.prototypes = nn.Parameter(torch.randn(num_experts, dim) * dim**-0.5)

    def forward(self, x: Tensor, *, context: Rows | None = None) -> Tensor:
        mu, tau = self.prototypes.to(x.dtype), self.temperature
        matrix, bias, s = mu * (2 * self.scale / tau), mu.square().sum(-1) / -tau, self.scale**2 / tau
        if transforming():
            return F.linear(x, matrix, bias) - s * x.square().sum(-1, keepdim=True)
        return _Affine.apply(x, matrix, bias, s)  # type: ignore[no-any-return]

    @property
    def matrix(self) -> Tensor:
        return self.prototypes

    def affine(self) -> tuple[Tensor, Tensor]:
        mu = full(self.prototypes)
        return 2 * self.scale * mu / self.temperature, -mu.square().sum(-1) / self.temperature

    def rounding(self, x: Tensor, precision: torch.dtype) -> Tensor:
        """Return the coefficients; c_2 is the rounding that adding -|c x|^2/tau costs each logit."""
        matrix, bias = (t.to(x.dtype) for t in self.affine())
        size, least = matrix.norm(dim=1), self.dim * torch.finfo(precision).tiny
        tied = gamma(2 * self.dim + 6, precision) * bias.abs() + least
        bend = torch.full_like(size, gamma(3, precision) * self.scale**2 / self.temperature)
        return torch.stack([tied, gamma(self.dim + 6, precision) * size, bend])

    def lipschitz(self) -> float:
        mu = full(self.prototypes.detach())
        return float(2 * self.scale * sigma_max(mu - mu.mean(0)) / self.temperature)


class _Affine(torch.autograd.Function):
    """A x + b - s |x|^2 for x (N, D): one pass over the tokens beside the GEMM, in either direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, bias: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(x, matrix)
        ctx.s = s
        y = torch.addmm(bias, x, matrix.T)
        return y.sub_(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_(), alpha=s)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, matrix = ctx.saved_tensors
        d_x = (grad @ matrix).addcmul_(x, grad.sum(-1, keepdim=True), value=-2 * ctx.s)
        return d_x, grad.T @ x, grad.sum(0), None

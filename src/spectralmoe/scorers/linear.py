"""Linear gate: the dot-product router of most MoE models.

Shazeer et al., "Outrageously Large Neural Networks", arXiv 1701.06538, section 2.1 (without the noise).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.context import Rows
from spectralmoe.linalg import sigma_max
from spectralmoe.scorers.base import Scorer
from spectralmoe.sharding import full

__all__ = ["LinearScorer"]


class LinearScorer(Scorer):
    r"""Scores a token by a dot product with a learned row of each expert: :math:`s = x W^\top + b`, W (E, D), b (E,).

    The entries of W start as N(0, 1/D), so that tokens of unit variance get logits of unit variance.

    Args:
        bias: whether there is a b, which starts at 0.

    >>> scorer = LinearScorer(16, 4)
    >>> scorer(torch.randn(5, 16)).shape
    torch.Size([5, 4])
    """

    rows = ("weight", "bias")

    def __init__(self, dim: int, num_experts: int, *, bias: bool = False) -> None:
        super().__init__(dim, num_experts)
        self.weight = nn.Parameter(torch.randn(num_experts, dim) * dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None

    def spec_arguments(self) -> dict[str, object]:
        """Return the constructor arguments that are not attributes of the same name."""
        return {"bias": self.bias is not None}

    def forward(self, x: Tensor, *, context: Rows | None = None) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    @property
    def matrix(self) -> Tensor:
        return self.weight

    def affine(self) -> tuple[Tensor, Tensor]:
        weight = full(self.weight)
        return weight, weight.new_zeros(self.num_experts) if self.bias is None else full(self.bias)

    def lipschitz(self) -> float:
        weight = full(self.weight.detach())
        return float(sigma_max(weight - weight.mean(0)))

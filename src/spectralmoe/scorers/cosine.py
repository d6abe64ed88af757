"""Cosine gate: a token is scored by its direction alone, in an optional low-dimensional space.

Chi et al., "On the Representation Collapse of Sparse Mixture of Experts" (X-MoE), arXiv 2204.09179, section 3.2;
authors' code: github.com/microsoft/torchscale (MIT). Differs: the temperature is fixed, not learned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.context import Rows
from spectralmoe.errors import UserError
from spectralmoe.scorers.base import Scorer, gamma, half_space_distance
from spectralmoe.sharding import full

__all__ = ["CosineScorer"]

_SHORTEST = 1e-12


class CosineScorer(Scorer):
    r"""Scores a token by its cosine with a learned key of each expert: :math:`s_i = \cos(W x, k_i) / \tau`.

    The keys k are (E, P), the learned projection W is (P, D); without it, W = 1 and P = D. The lengths of x and of the
    keys do not matter. The logits have no Lipschitz constant, because the cosine jumps at x = 0.

    Args:
        proj_dim: P, the width of the space in which cosines are taken; None, the default, takes no projection.
        temperature: tau > 0, fixed.

    Raises:
        UserError: the temperature is not positive, or proj_dim < 1.

    >>> scorer = CosineScorer(16, 4, proj_dim=8)
    >>> x = torch.randn(5, 16)
    >>> torch.allclose(scorer(x), scorer(3 * x), atol=1e-5)
    True
    """

    rows = ("keys",)

    def __init__(self, dim: int, num_experts: int, *, proj_dim: int | None = None, temperature: float = 0.07) -> None:
        super().__init__(dim, num_experts)
        if not 0 < temperature < float("inf"):
            raise UserError(f"CosineScorer: temperature must be positive, got {temperature}")
        if proj_dim is not None and proj_dim < 1:
            raise UserError(f"CosineScorer: proj_dim must be at least 1, got {proj_dim}")
        self.proj_dim, self.temperature = proj_dim, temperature
        width = proj_dim or dim
        self.keys = nn.Parameter(torch.randn(num_experts, width) * width**-0.5)
        self.projection = None if proj_dim is None else nn.Parameter(torch.randn(proj_dim, dim) * dim**-0.5)

    def forward(self, x: Tensor, *, context: Rows | None = None) -> Tensor:
        query = x if self.projection is None else F.linear(x, self.projection.to(x.dtype))
        keys = F.normalize(self.keys.to(x.dtype), dim=-1) / self.temperature
        length: Tensor = torch.linalg.vector_norm(query, dim=-1, keepdim=True).clamp_min(_SHORTEST)
        return F.linear(query, keys) / length  # E divisions a token instead of P

    @property
    def matrix(self) -> Tensor:
        """The keys (E, P), each divided by its norm."""
        return F.normalize(self.keys, dim=-1)

    def flip_distance(
        self, x: Tensor, over: Tensor, under: Tensor, *, precision: torch.dtype = torch.float64
    ) -> Tensor:
        """Return the exact distance, less rounding.

        The factor 1/(tau |W x|) is common to all experts and positive, so the choice is that of a linear gate whose
        rows are k W, each key k divided by its norm. The rounding of the keys, of W x and of their product counts.
        """
        rows = F.normalize(full(self.keys).to(x.dtype), dim=-1)
        terms, sizes = 2 * rows.shape[1] + 8, rows.abs()
        if self.projection is not None:
            projection = full(self.projection).to(x.dtype)
            rows, terms, sizes = rows @ projection, terms + self.dim, sizes @ projection.abs()
        zero, least = rows.new_zeros(self.num_experts), self.dim * torch.finfo(precision).tiny
        error = torch.stack([zero + least, gamma(terms, precision) * sizes.norm(dim=1), zero])
        return half_space_distance(rows, zero, x, over, under, error=error)

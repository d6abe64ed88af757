"""Eigen experts: every expert is a matrix with orthonormal bases of its own.

Cheng et al., "ERMoE: Eigen-Reparameterized Mixture-of-Experts", arXiv 2511.10971, section on the experts. Authors'
code: github.com/Belis0811/ERMoE (AGPL-3.0 and no commercial use; this file is written from the equations). Differs: the
bases are put back on their manifold after the optimizer step, by QR with the signs of the columns kept, so that
momentum stays valid; they start as blocks of one orthogonal matrix, because orthonormal columns alone do not keep
experts apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from spectralmoe.errors import UserError
from spectralmoe.experts.base import Experts
from spectralmoe.experts.grouped_gemm import grouped_linear, supports_grouped_mm
from spectralmoe.linalg import qr_retraction
from spectralmoe.stacks import shares_of

__all__ = ["EigenExperts"]


class EigenExperts(Experts):
    r"""Holds E linear maps :math:`W_e = U_e\,\mathrm{diag}(s_e)\,V_e^\top`, where U_e and V_e have orthonormal columns.

    ``BasisScorer`` routes by the bases V. The hidden activations are the coordinates :math:`V_e^\top x`. U and V are
    made orthonormal again after each optimizer step (``attach`` or ``after_step``).

    Args:
        rank: R, 1 to D. With R <= D/E the bases V of all experts start orthogonal to each other.

    Attributes:
        left, right: U and V, each (E, D, R).
        scale: s (E, R), which starts at 1.

    Raises:
        UserError: rank is not 1 to D.

    >>> bank = EigenExperts(2, dim=8, rank=3)
    >>> x = torch.randn(5, 8)
    >>> matrix = bank.left[1] @ bank.scale[1].diag() @ bank.right[1].T
    >>> torch.allclose(bank(x, torch.tensor([3, 2]))[3:], x[3:] @ matrix.T, atol=1e-6)
    True
    """

    manifold = ("left", "right")
    row_dims = 1

    def __init__(self, num_experts: int, dim: int, rank: int) -> None:
        super().__init__(num_experts)
        if not 1 <= rank <= dim:
            raise UserError(f"EigenExperts: rank R must be between 1 and D={dim}, got {rank}")
        self.dim, self.rank = dim, rank
        self.left, self.right = _bases(num_experts, dim, rank), _bases(num_experts, dim, rank)
        self.scale = nn.Parameter(torch.ones(num_experts, rank))

    def expert(self, x: Tensor, e: int) -> Tensor:
        y: Tensor = x @ self.right[e].to(x.dtype) @ self._out[e].to(x.dtype).T
        return y

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        return self.project(self.hidden(x, counts), counts)

    def hidden(self, x: Tensor, counts: Tensor) -> Tensor:
        return grouped_linear(x, self.right.mT, counts)

    def project(self, hidden: Tensor, counts: Tensor) -> Tensor:
        return grouped_linear(hidden, self._out, counts)

    def reads_loads(self, x: Tensor) -> bool:
        return not supports_grouped_mm(x, self.left)

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        """Run all experts on all rows by two GEMMs; the coordinates are multiplied by ``weights`` (N, E)."""
        coordinates = x @ self.right.to(x.dtype).transpose(0, 1).flatten(1)
        weighted = coordinates.unflatten(-1, (self.num_experts, -1)) * weights.unsqueeze(-1)
        y: Tensor = weighted.flatten(1) @ self._out.to(x.dtype).transpose(1, 2).flatten(0, 1)
        return y

    @torch.no_grad()
    def averaged(
        self, groups: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None = None
    ) -> EigenExperts:
        """Return a bank whose matrices are the means of the W of each group, cut to rank R by an SVD."""
        members, shares = shares_of(f"{type(self).__name__}.averaged", groups, weights, self.num_experts)
        bank = cast(EigenExperts, self.select([group[0] for group in members]))
        left, scale, right = (stack.double() for stack in (self.left, self.scale, self.right))
        for place, (group, share) in enumerate(zip(members, shares, strict=True)):
            if len(group) > 1:
                parts = left[group] * (scale[group] * share.to(scale.device)[:, None])[:, None]
                u, s, vh = torch.linalg.svd((parts @ right[group].mT).sum(0))
                bank.left[place], bank.scale[place] = u[:, : self.rank], s[: self.rank]
                bank.right[place] = vh[: self.rank].mT
        return bank

    def expert_parameters(self, e: int) -> dict[str, Tensor]:
        return {"left": self.left[e], "scale": self.scale[e], "right": self.right[e]}

    @property
    def _out(self) -> Tensor:
        """U diag(s) (E, D, R)."""
        return self.left * self.scale[:, None]


def _bases(num_experts: int, dim: int, rank: int) -> nn.Parameter:
    """Orthonormal bases (E, D, R): blocks of as few random orthogonal matrices as hold them."""
    each = dim // rank
    whole = qr_retraction(torch.randn(-(-num_experts // each), dim, each * rank))
    blocks = whole.unflatten(-1, (each, rank)).transpose(1, 2).flatten(0, 1)
    return nn.Parameter(blocks[:num_experts].contiguous())

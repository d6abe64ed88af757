"""MPO experts: their matrices are matrix product operators that share a central core.

Gao et al., "Parameter-Efficient Mixture-of-Experts Architecture for Pre-trained Language Models" (MPOE), arXiv
2203.01104 (COLING 2022): experts by matrix product operators. Authors' code: github.com/RUCAIBox/MPOE (Apache-2.0);
this file is written from the equations.
Differs: a matrix is decomposed from both of its ends, so that the central core holds all singular values and the
others are orthonormal; the matrix is the same. There may be any odd number of cores, and any router.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt, prod
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.errors import UserError, one_of
from spectralmoe.experts.base import Experts
from spectralmoe.experts.feed_forward import activate
from spectralmoe.experts.grouped_gemm import grouped_linear, supports_grouped_mm
from spectralmoe.experts.matrix_products import MatrixProducts
from spectralmoe.stacks import copy_with

__all__ = ["MPOExperts", "three_factors"]


class MPOExperts(Experts):
    r"""Holds E networks :math:`W_e^{(2)}\,a(W_e^{(1)} x)`, D -> H -> D, whose matrices are products of small cores.

    A matrix of :math:`\prod_k i_k` rows and :math:`\prod_k j_k` columns is

    .. math:: W_e[i_1 \ldots i_n, j_1 \ldots j_n] = T_{1e}[i_1, j_1] \cdots C[i_c, j_c] \cdots T_{ne}[i_n, j_n],

    where :math:`T_k[i, j]` is a matrix :math:`(d_{k-1}, d_k)`. All experts share the central core C, which holds most
    of the numbers; the other cores are an expert's own. With the bonds :math:`d_k = \min(\prod_{m \le k} i_m j_m,
    \prod_{m > k} i_m j_m)` any matrix is such a product. A forward multiplies the cores out to plain matrices, which
    takes some time whatever the number of tokens, and the memory of E matrices until the backward is done.

    ``from_dense`` sets all experts to one network. Without it the experts' own cores start random and orthonormal, and
    C starts such that the matrices have the size that ``nn.Linear`` gives them.

    Args:
        dim: D.
        hidden: H.
        factors: the factors of D and of H, the same odd number of each, three or more. None takes three each, as equal
            as possible, the largest in the middle (``three_factors``).
        bond: an upper bound on all :math:`d_k`; None sets none.
        activation: a, "gelu" or "relu".

    Attributes:
        up, down: the ``MatrixProducts`` of (H, D) and of (D, H).

    Raises:
        UserError: a size is below 1, the factors do not multiply to D and H or differ in number, or the activation is
            unknown.

    >>> bank = MPOExperts(4, dim=16, hidden=32, factors=((2, 4, 2), (2, 8, 2)))
    >>> up, down = torch.randn(32, 16), torch.randn(16, 32)
    >>> y = bank.from_dense(up, down)(torch.eye(16)[:3], torch.tensor([0, 2, 0, 1]))
    >>> torch.allclose(y, torch.nn.functional.gelu(up.T[:3]) @ down.T, atol=1e-4)
    True
    """

    row_dims = 1

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        *,
        factors: tuple[Sequence[int], Sequence[int]] | None = None,
        bond: int | None = None,
        activation: Literal["gelu", "relu"] = "gelu",
    ) -> None:
        super().__init__(num_experts)
        if activation not in ("gelu", "relu"):
            raise one_of("activation", activation, ["gelu", "relu"])
        if min(dim, hidden) < 1 or (bond is not None and bond < 1):
            raise UserError(f"MPOExperts: D, H and bond must be at least 1, got {dim}, {hidden} and {bond}")
        self.dim, self.width, self.bond, self.activation = dim, hidden, bond, activation
        self.factors = (
            (three_factors(dim), three_factors(hidden)) if factors is None else _checked(factors, dim, hidden)
        )
        of_dim, of_hidden = self.factors
        self.up = MatrixProducts(num_experts, of_hidden, of_dim, bond)
        self.down = MatrixProducts(num_experts, of_dim, of_hidden, bond)

    def spec_arguments(self) -> dict[str, object]:
        """Return the constructor arguments that are not attributes of the same name."""
        return {"hidden": self.width}

    @property
    def central(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The cores that all experts share: that of the first and that of the second matrices."""
        return self.up.central, self.down.central

    def from_dense(self, up: Tensor, down: Tensor) -> Self:
        """Set every expert to the dense network of ``up`` (H, D) and ``down`` (D, H), and return the bank.

        Without a bound on the bonds this is exact up to rounding. With one, the smallest singular values are left out;
        in matrices that were not trained these carry much of the norm.

        Raises:
            UserError: the matrices have other shapes.
        """
        shapes, wanted = [tuple(up.shape), tuple(down.shape)], [(self.width, self.dim), (self.dim, self.width)]
        if shapes != wanted:
            raise UserError(f"MPOExperts.from_dense: up and down must be (H, D) and (D, H), {wanted}, got {shapes}")
        self.up.fill(up)
        self.down.fill(down)
        return self

    def expert(self, x: Tensor, e: int) -> Tensor:
        up, down = (each.matrices(slice(e, e + 1))[0].to(x.dtype) for each in (self.up, self.down))
        return F.linear(activate(self.activation, F.linear(x, up)), down)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        return self.project(self.hidden(x, counts), counts)

    def hidden(self, x: Tensor, counts: Tensor) -> Tensor:
        return activate(self.activation, grouped_linear(x, self.up.matrices(), counts))

    def project(self, hidden: Tensor, counts: Tensor) -> Tensor:
        return grouped_linear(hidden, self.down.matrices(), counts)

    def reads_loads(self, x: Tensor) -> bool:
        return not supports_grouped_mm(x, x.new_empty(0, self.width, self.dim))

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        """Run all experts on all rows by two GEMMs; the hidden activations are multiplied by ``weights`` (N, E)."""
        h = F.linear(x, self.up.matrices().to(x.dtype).flatten(0, 1)).unflatten(-1, (self.num_experts, -1))
        weighted = activate(self.activation, h) * weights.unsqueeze(-1)
        y: Tensor = weighted.flatten(1) @ self.down.matrices().to(x.dtype).transpose(1, 2).flatten(0, 1)
        return y

    def expert_parameters(self, e: int) -> dict[str, Tensor]:
        """Return the expert's own cores, without the central ones."""
        named = {"up": self.up, "down": self.down}
        return {f"{name}.{core}": value[e] for name, part in named.items() for core, value in part.own().items()}

    def costs(self, shape: Sequence[int] = ()) -> Tensor:
        """Return the operations of each expert on one row (E,): two plain matrices, without multiplying out cores."""
        return torch.full((self.num_experts,), 4.0 * self.dim * self.width, dtype=torch.float64)

    def _restacked(self, change: Callable[[Tensor], Tensor], num_experts: int) -> MPOExperts:
        """A copy of ``num_experts`` experts, with ``change`` done to their own cores; the central ones stay."""
        own = [core for part in (self.up, self.down) for core in part.own().values()]
        bank = copy_with(self, {core: change(core.detach()) for core in own})
        bank.num_experts = num_experts
        return bank


def three_factors(size: int) -> tuple[int, int, int]:
    """Split ``size`` into three factors that are as equal as possible, the largest in the middle.

    >>> three_factors(64), three_factors(768), three_factors(7)
    ((4, 4, 4), (8, 12, 8), (1, 7, 1))
    """
    found = [
        (size // (a * b), b, a)
        for a in range(1, isqrt(size) + 1)
        if size % a == 0
        for b in range(a, isqrt(size // a) + 1)
        if size // a % b == 0
    ]
    largest, middle, smallest = min(found)
    return smallest, largest, middle


def _checked(factors: Sequence[Sequence[int]], dim: int, hidden: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    lists = [tuple(each) for each in factors]
    whole = all(isinstance(each, int) and each >= 1 for factors in lists for each in factors)
    alike = len(lists) == 2 and len(lists[0]) == len(lists[1]) >= 3 and len(lists[0]) % 2 == 1
    if not (whole and alike and [prod(each) for each in lists] == [dim, hidden]):
        raise UserError(
            f"MPOExperts: factors must be those of D={dim} and of H={hidden}, as many of each, an odd number of at "
            f"least three, such as {three_factors(dim)}, {three_factors(hidden)}; got {factors}"
        )
    return lists[0], lists[1]

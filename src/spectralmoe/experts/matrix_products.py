"""MatrixProducts: stacked matrices in the form of matrix product operators with a common core.

Oseledets, "Tensor-Train Decomposition", SIAM Journal on Scientific Computing 33(5), 2011, where each index is a pair of
one of the rows and one of the columns; a core that experts share: Gao et al., arXiv 2203.01104.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

from spectralmoe.linalg import qr_retraction
from spectralmoe.sharding import assign_

__all__ = ["MatrixProducts"]


class MatrixProducts(nn.Module):
    """Holds E matrices (I, J), each a product of cores, of which all share the central one.

    The bond d between two cores is the rank at which the matrix is cut there. Without a bound it is the largest that a
    matrix can need.

    Args:
        num_experts: E.
        rows, columns: the factors of I and of J, the same odd number of each.
        bond: an upper bound on all bonds; None sets none.

    Attributes:
        left, right: the cores before and behind the central one, each (E, d, i, j, d').
        central: the common core (d, i, j, d').

    >>> products = MatrixProducts(8, (4, 8, 4), (4, 4, 4))
    >>> tuple(products.matrices().shape), tuple(products.central.shape), tuple(products.left[0].shape)
    ((8, 128, 64), (16, 8, 4, 16), (8, 1, 4, 4, 16))
    """

    def __init__(
        self, num_experts: int, rows: tuple[int, ...], columns: tuple[int, ...], bond: int | None = None
    ) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        legs, middle = [i * j for i, j in zip(rows, columns, strict=True)], len(rows) // 2
        full = [min(prod(legs[:k]), prod(legs[k:])) for k in range(len(legs) + 1)]
        bonds = full if bond is None else [min(each, bond) for each in full]
        shapes = [(before, i, j, behind) for (before, behind), i, j in zip(pairwise(bonds), rows, columns, strict=True)]
        self.left = nn.ParameterList([_columns(num_experts, *shape) for shape in shapes[:middle]])
        self.right = nn.ParameterList([_rows(num_experts, *shape) for shape in shapes[middle + 1 :]])
        bound = (prod(rows) / prod(shapes[middle])) ** 0.5  # the others keep the norm: as large as nn.Linear starts
        self.central = nn.Parameter(torch.empty(shapes[middle]).uniform_(-bound, bound))

    def own(self) -> dict[str, Tensor]:
        """Return the cores that have one entry an expert, by name."""
        return {name: core for name, core in self.named_parameters() if name != "central"}

    def matrices(self, experts: slice = slice(None)) -> Tensor:
        """Multiply the cores of ``experts`` out: matrices (E, I, J)."""
        first, *others = [core[experts] for core in self.left]
        left = first.flatten(1, 3)  # (E, legs so far, d)
        for core in (*others, self.central):
            left = (left @ core.flatten(-3)).unflatten(-1, (-1, core.shape[-1])).flatten(1, 2)
        *others, last = [core[experts] for core in self.right]
        right = last.flatten(2)  # (E, d, legs from here)
        for core in reversed(others):
            right = (core.flatten(1, 3) @ right).unflatten(1, (core.shape[1], -1)).flatten(2)
        pairs = [each for pair in zip(self.rows, self.columns, strict=True) for each in pair]
        whole = (left @ right).reshape(-1, *pairs)
        order = [0, *range(1, whole.dim(), 2), *range(2, whole.dim(), 2)]
        matrices: Tensor = whole.permute(order).reshape(-1, prod(self.rows), prod(self.columns))
        return matrices

    @torch.no_grad()
    def fill(self, matrix: Tensor) -> None:
        """Set all E matrices to the given one (I, J), by successive singular value decompositions in float64.

        The cores on the left get orthonormal columns, those on the right orthonormal rows, and the central core the
        rest. Where a bond is bounded, only the largest singular values are kept.
        """
        count = len(self.rows)
        order = [each for pair in zip(range(count), range(count, 2 * count), strict=True) for each in pair]
        rest = matrix.detach().double().reshape(*self.rows, *self.columns).permute(order)
        for core in self.left:
            before, behind = core.shape[1], core.shape[-1]
            legs = before * core.shape[2] * core.shape[3]
            u, s, vh = torch.linalg.svd(rest.reshape(legs, -1), full_matrices=False)
            _assign(core, u[:, :behind])
            rest = s[:behind, None] * vh[:behind]
        for core in [*self.right][::-1]:
            before = core.shape[1]
            u, s, vh = torch.linalg.svd(rest.reshape(-1, core[0, 0].numel()), full_matrices=False)
            _assign(core, vh[:before])
            rest = u[:, :before] * s[:before]
        _assign(self.central, rest)


def _assign(core: Tensor, value: Tensor) -> None:
    """Write ``value`` into ``core``, the same for each expert where it has them."""
    shape = core.shape if core.dim() == 4 else core.shape[1:]
    assign_(core, value.reshape(shape).to(core).expand(core.shape))


def _columns(num_experts: int, before: int, i: int, j: int, behind: int) -> nn.Parameter:
    """Cores (E, d, i, j, d') whose d' columns are orthonormal."""
    drawn = qr_retraction(torch.randn(num_experts, before * i * j, behind))
    return nn.Parameter(drawn.reshape(num_experts, before, i, j, behind))


def _rows(num_experts: int, before: int, i: int, j: int, behind: int) -> nn.Parameter:
    """Cores (E, d, i, j, d') whose d rows are orthonormal."""
    drawn = qr_retraction(torch.randn(num_experts, i * j * behind, before)).mT
    return nn.Parameter(drawn.reshape(num_experts, before, i, j, behind).contiguous())

"""The home of the spectra: largest singular value, stable rank, retraction onto orthonormal columns.

Sharded parameters are gathered first, differentiably where a gradient flows (``sharding.full``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmoe.sharding import full

__all__ = [
    "EXACT_LIMIT",
    "is_orthonormal",
    "orthonormality_error",
    "power_iteration",
    "qr_retraction",
    "retracted",
    "sigma_max",
    "spectrum",
    "stable_rank",
    "top_right",
]

EXACT_LIMIT = 128
"""Matrices whose smaller side is at most this get their spectrum exactly (an eigendecomposition of the Gram matrix)."""


_ROUNDINGS = 64


def top_right(matrix: Tensor) -> Tensor:
    """Exact leading right singular vector v (D,) of ``matrix`` (E, D), without gradient.

    From the eigendecomposition of the smaller Gram matrix, in at least fp32. Without rows, any direction will do.
    """
    m = matrix.detach()
    wide = 0 < m.shape[0] <= m.shape[1]
    top: Tensor = torch.linalg.eigh(m @ m.T if wide else m.T @ m).eigenvectors[:, -1]
    return _unit(m.T @ top) if wide else top


def power_iteration(matrix: Tensor, start: Tensor, steps: int = 1) -> Tensor:
    """``steps`` rounds of v <- M'M v / |M'M v| from ``start`` (D,), without gradient; returns v (D,).

    v is zero where M v is.
    """
    m, v = matrix.detach(), start.detach().to(matrix.dtype)
    for _ in range(steps):
        v = _unit(m.T @ (m @ v))
    return v


def sigma_max(matrix: Tensor, direction: Tensor | None = None) -> Tensor:
    r"""Largest singular value :math:`\sigma_1 = \|M v\|` of ``matrix`` (E, D), with the gradient :math:`u v^\top`.

    ``direction`` is the leading right singular vector if it is known (from ``power_iteration``); left out, it is
    found exactly. A zero matrix has value 0 and gradient 0.

    >>> round(float(sigma_max(torch.diag(torch.tensor([3.0, 1.0])))), 5)
    3.0
    """
    matrix = full(matrix)
    v = top_right(matrix) if direction is None else direction.to(matrix.dtype)
    u = _unit(matrix.detach() @ v)
    return u @ (matrix @ v)


def stable_rank(matrix: Tensor, direction: Tensor | None = None) -> Tensor:
    r"""Stable rank :math:`\|M\|_F^2 / \sigma_1^2`, between 1 and the rank; 0 (with gradient 0) for a zero matrix.

    >>> round(float(stable_rank(torch.eye(4))), 5)
    4.0
    """
    return spectrum(matrix, direction)[1]


def spectrum(matrix: Tensor, direction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``sigma_max`` and ``stable_rank`` from one decomposition."""
    matrix = full(matrix)
    sigma = sigma_max(matrix, direction)
    ratio = torch.linalg.vector_norm(matrix) / torch.where(sigma == 0, torch.ones_like(sigma), sigma)
    return sigma, torch.where(sigma == 0, torch.zeros_like(ratio), ratio.square())


def qr_retraction(basis: Tensor) -> Tensor:
    """The nearest-by-QR matrix with orthonormal columns, signs of the columns kept (D, R) -> (D, R).

    Plain QR may flip columns; multiplying Q by sign(diag R) makes the map continuous, so that an optimizer's
    momentum keeps its meaning from step to step.
    """
    q, r = torch.linalg.qr(full(basis.detach()))
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    retracted: Tensor = (q * sign).contiguous()  # QR lays out columns, FSDP2 takes rows only
    return retracted


def orthonormality_error(basis: Tensor) -> Tensor:
    r"""The largest entry of :math:`|U^\top U - 1|` of ``basis`` U (D, R): a scalar, without gradient."""
    u = full(basis.detach())
    return (u.T @ u - torch.eye(u.shape[1], dtype=u.dtype, device=u.device)).abs().amax()


def is_orthonormal(basis: Tensor) -> Tensor:
    """Whether the columns of ``basis`` (D, R) are orthonormal up to rounding: a scalar bool."""
    return orthonormality_error(basis) <= _ROUNDINGS * torch.finfo(basis.dtype).eps


def retracted(basis: Tensor) -> Tensor:
    """``qr_retraction``, or ``basis`` (D, R) itself, bit by bit, where its columns are orthonormal up to rounding."""
    whole = full(basis.detach())
    return torch.where(is_orthonormal(whole), whole, qr_retraction(whole))


def _unit(x: Tensor) -> Tensor:
    """``x`` over its norm; zero stays zero."""
    norm = torch.linalg.vector_norm(x)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)

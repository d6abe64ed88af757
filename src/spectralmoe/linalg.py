"""The home of the spectra: largest singular value, stable rank, retraction onto orthonormal columns.

Every matrix is divided by its largest entry first, so no square leaves the range of its numbers. What is not finite has
no spectrum: nan.

Sharded parameters are gathered first, differentiably where a gradient flows (``sharding.full``). Autocast has no say in
products here: its 16 bits would change a spectrum by percents.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from spectralmoe.sharding import full
from spectralmoe.torch_private import transforming

__all__ = [
    "EXACT_LIMIT",
    "is_orthonormal",
    "largest_entry",
    "orthonormality_error",
    "over_largest",
    "power_iteration",
    "qr_retraction",
    "retracted",
    "sigma_max",
    "spectrum",
    "stable_rank",
    "top_right",
    "without_autocast",
]

EXACT_LIMIT = 128
"""Matrices whose smaller side is at most this get their spectrum exactly (an eigendecomposition of the Gram matrix).

On a device the host waits for each of these; a power iteration, which larger ones get, waits for nothing.
"""


_ROUNDINGS = 64

_Others = ParamSpec("_Others")
_Result = TypeVar("_Result")


def without_autocast(
    function: Callable[Concatenate[Tensor, _Others], _Result],
) -> Callable[Concatenate[Tensor, _Others], _Result]:
    """``function`` of a tensor, and of anything else, with autocast off for the tensor's device."""

    @wraps(function)
    def run(x: Tensor, /, *args: _Others.args, **kwargs: _Others.kwargs) -> _Result:
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return run


@without_autocast
def top_right(matrix: Tensor) -> Tensor:
    """Exact leading right singular vector v (D,) of ``matrix`` (E, D), without gradient.

    From the eigendecomposition of the smaller Gram matrix, in at least fp32. Without rows, any direction will do.
    """
    m = _scaled(matrix.detach())[0].nan_to_num(0, 0, 0)
    wide = 0 < m.shape[0] <= m.shape[1]
    top: Tensor = torch.linalg.eigh(m @ m.T if wide else m.T @ m).eigenvectors[:, -1]
    return _unit(m.T @ top) if wide else top


@without_autocast
def power_iteration(matrix: Tensor, start: Tensor, steps: int = 1) -> Tensor:
    """``steps`` rounds of v <- M'M v / |M'M v| from ``start`` (D,), without gradient; returns v (D,).

    v is zero where M v is.
    """
    m = _scaled(matrix.detach())[0]
    v = start.detach().to(m.dtype)
    for _ in range(steps):
        v = _unit(m.T @ _unit(m @ v))
    return v


def sigma_max(matrix: Tensor, direction: Tensor | None = None) -> Tensor:
    r"""Largest singular value :math:`\sigma_1 = \|M v\|` of ``matrix`` (E, D), with the gradient :math:`u v^\top`.

    ``direction`` is the leading right singular vector if it is known (from ``power_iteration``); left out, it is
    found exactly. A zero matrix has value 0 and gradient 0; one that is not finite has value nan.

    The direction is held fixed, so a gradient of this gradient lacks a part. Second derivatives are those of
    ``torch.func`` (``hessian``, ``jvp`` of ``grad``), where :math:`\sigma_1` comes from the eigenvalues.

    >>> round(float(sigma_max(torch.diag(torch.tensor([3.0, 1.0])))), 5)
    3.0
    """
    return spectrum(matrix, direction)[0]


def stable_rank(matrix: Tensor, direction: Tensor | None = None) -> Tensor:
    r"""Stable rank :math:`\|M\|_F^2 / \sigma_1^2`, between 1 and the rank; 0 (with gradient 0) for a zero matrix.

    >>> round(float(stable_rank(torch.eye(4))), 5)
    4.0
    """
    return spectrum(matrix, direction)[1]


@without_autocast
def spectrum(matrix: Tensor, direction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``sigma_max`` and ``stable_rank`` from one decomposition."""
    m, largest = _scaled(full(matrix))
    if transforming():
        sigma = _root_of_largest_eigenvalue(m)
    else:
        v = top_right(m) if direction is None else direction.to(m.dtype)
        sigma = _unit(m.detach() @ v) @ (m @ v)
    zero = sigma == 0
    ratio = torch.linalg.vector_norm(m) / torch.where(zero, torch.ones_like(sigma), sigma)
    return sigma * largest[0, 0], torch.where(zero, torch.zeros_like(ratio), ratio.square())


def qr_retraction(basis: Tensor) -> Tensor:
    """The nearest-by-QR matrix with orthonormal columns, signs of the columns kept (..., D, R) -> (..., D, R).

    Plain QR may flip columns; multiplying Q by sign(diag R) makes the map continuous, so that an optimizer's
    momentum keeps its meaning from step to step.
    """
    q, r = torch.linalg.qr(_scaled(full(basis.detach()))[0])
    sign = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    retracted: Tensor = (q * sign[..., None, :]).to(basis.dtype)
    return retracted.contiguous()  # QR lays out columns, FSDP2 takes rows only


@without_autocast
def orthonormality_error(basis: Tensor) -> Tensor:
    r"""The largest entry of :math:`|U^\top U - 1|` of ``basis`` U (..., D, R): (...), without gradient."""
    u = full(basis.detach())
    return (u.mT @ u - torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)).abs().amax((-2, -1))


def is_orthonormal(basis: Tensor) -> Tensor:
    """Whether the columns of each ``basis`` (..., D, R) are orthonormal up to rounding: (...) bool."""
    return orthonormality_error(basis) <= _ROUNDINGS * torch.finfo(basis.dtype).eps


def retracted(basis: Tensor) -> Tensor:
    """``qr_retraction``, or each ``basis`` (..., D, R) itself, bit by bit, where it is orthonormal up to rounding."""
    whole = full(basis.detach())
    return torch.where(is_orthonormal(whole)[..., None, None], whole, qr_retraction(whole))


def largest_entry(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The largest absolute value along ``dim``, which stays with size 1; 1 where all are zero or there are none.

    >>> largest_entry(torch.tensor([[3.0, -4.0], [0.0, 0.0]]), 1).tolist()
    [[4.0], [1.0]]
    """
    if not x.numel():
        return x.new_ones(())
    largest = x.abs().amax(dim, keepdim=True)
    return torch.where(largest == 0, 1, largest)


def over_largest(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """``x`` over its largest absolute value along ``dim``, so that no product leaves the range of its numbers.

    >>> over_largest(torch.tensor([1e30, -2e30]), 0).tolist()
    [0.5, -1.0]
    """
    return x / largest_entry(x, dim)


def _root_of_largest_eigenvalue(m: Tensor) -> Tensor:
    """sigma_1 of m (E, D) from its smaller Gram matrix, as often differentiable as the eigenvalue is simple."""
    gram = (m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m).nan_to_num(0, 0, 0)
    largest = torch.linalg.eigvalsh(gram)[-1]
    return torch.where(largest > 0, torch.where(largest > 0, largest, 1).sqrt(), 0)


def _scaled(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``matrix`` (..., D, R), in at least fp32, over its largest entry, and that entry (..., 1, 1), 1 for zeros.

    The entry has no gradient. Both are nan throughout where an entry of the matrix is not finite.
    """
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    entries = matrix.detach()
    if entries.numel():
        largest = torch.linalg.vector_norm(entries, torch.inf, dim=(-2, -1), keepdim=True)
    else:
        largest = entries.new_ones(1, 1)
    largest = torch.where(largest == 0, 1, largest).masked_fill(~largest.isfinite(), torch.nan)
    return matrix / largest, largest


def _unit(x: Tensor) -> Tensor:
    """``x`` over its norm; zero stays zero."""
    norm = torch.linalg.vector_norm(x)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)

"""Spectra of matrices: largest singular value, stable rank, and retraction onto orthonormal columns.

Every matrix is first divided by its largest entry, so that no square overflows. The spectrum of a matrix with entries
that are not finite is nan. Sharded parameters are gathered first, with gradient (``sharding.full``). Autocast is
switched off, because 16 bits would change a spectrum by percents.
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
    "qr_retraction",
    "retracted",
    "sigma_max",
    "spectrum",
    "stable_rank",
    "top_right",
    "without_autocast",
]

EXACT_LIMIT = 128
"""Matrices whose smaller side is at most this get an eigendecomposition of their Gram matrix, for which the CPU waits
for a GPU. The Gram matrix of larger ones is squared again and again, for which it does not wait.
"""

_SQUARINGS = 16

_ROUNDINGS = 64

_Others = ParamSpec("_Others")
_Result = TypeVar("_Result")


def without_autocast(
    function: Callable[Concatenate[Tensor, _Others], _Result],
) -> Callable[Concatenate[Tensor, _Others], _Result]:
    """Return ``function`` with autocast switched off for the device of its first argument, a tensor."""

    @wraps(function)
    def run(x: Tensor, /, *args: _Others.args, **kwargs: _Others.kwargs) -> _Result:
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return run


@without_autocast
def top_right(matrix: Tensor) -> Tensor:
    """Compute the leading right singular vector v (D,) of ``matrix`` (E, D), without gradient, in fp32 or float64.

    It comes from the eigendecomposition of the smaller Gram matrix G; where that is larger than ``EXACT_LIMIT``, from
    the largest column of G^65536, which differs from v where two singular values agree to four digits.
    """
    m = _scaled(matrix.detach())[0].nan_to_num(0, 0, 0)
    wide = 0 < m.shape[0] <= m.shape[1]
    gram = m @ m.T if wide else m.T @ m
    top = torch.linalg.eigh(gram).eigenvectors[:, -1] if len(gram) <= EXACT_LIMIT else _top_of_power(gram)
    return _unit(m.T @ top) if wide else top


def sigma_max(matrix: Tensor) -> Tensor:
    r"""Compute the largest singular value :math:`\sigma_1 = \|M v\|` of a matrix M (E, D), with the gradient u v'.

    A zero matrix has the value 0 and the gradient 0; one that is not finite has the value nan.

    The gradient takes v as constant, so second derivatives by autograd lack a term. Those of ``torch.func``
    (``hessian``, ``jvp`` of ``grad``) are right: there :math:`\sigma_1` comes from eigenvalues.

    >>> round(float(sigma_max(torch.diag(torch.tensor([3.0, 1.0])))), 5)
    3.0
    """
    return spectrum(matrix)[0]


def stable_rank(matrix: Tensor) -> Tensor:
    r"""Compute the stable rank :math:`\|M\|_F^2 / \sigma_1^2`, from 1 to the rank; 0 with gradient 0 for a zero matrix.

    >>> round(float(stable_rank(torch.eye(4))), 5)
    4.0
    """
    return spectrum(matrix)[1]


@without_autocast
def spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``sigma_max`` and ``stable_rank`` by one decomposition."""
    m, largest = _scaled(full(matrix))
    if transforming():
        sigma = _root_of_largest_eigenvalue(m)
    else:
        v = top_right(m)
        sigma = _unit(m.detach() @ v) @ (m @ v)
    zero = sigma == 0
    ratio = torch.linalg.vector_norm(m) / torch.where(zero, torch.ones_like(sigma), sigma)
    return sigma * largest[0, 0], torch.where(zero, torch.zeros_like(ratio), ratio.square())


def qr_retraction(basis: Tensor) -> Tensor:
    """Make the columns of ``basis`` (..., D, R) orthonormal by QR, without flipping the sign of any.

    Plain QR may flip columns. Multiplying Q by sign(diag R) makes the map continuous, so that an optimizer's momentum
    stays valid from step to step.
    """
    q, r = torch.linalg.qr(_scaled(full(basis.detach()))[0])
    sign = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    retracted: Tensor = (q * sign[..., None, :]).to(basis.dtype)
    return retracted.contiguous()  # QR lays out columns, FSDP2 takes rows only


@without_autocast
def orthonormality_error(basis: Tensor) -> Tensor:
    r"""Return the largest entry of :math:`|U^\top U - 1|` for ``basis`` U (..., D, R): (...), without gradient."""
    u = full(basis.detach())
    return (u.mT @ u - torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)).abs().amax((-2, -1))


def is_orthonormal(basis: Tensor) -> Tensor:
    """Return whether the columns of each ``basis`` (..., D, R) are orthonormal up to rounding: (...) bool."""
    return orthonormality_error(basis) <= _ROUNDINGS * torch.finfo(basis.dtype).eps


def retracted(basis: Tensor) -> Tensor:
    """Apply ``qr_retraction`` to each ``basis`` (..., D, R) whose columns are not orthonormal up to rounding."""
    whole = full(basis.detach())
    return torch.where(is_orthonormal(whole)[..., None, None], whole, qr_retraction(whole))


def largest_entry(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Return the largest absolute value along ``dim``, which is kept with size 1; 1 if all are zero or none exist.

    >>> largest_entry(torch.tensor([[3.0, -4.0], [0.0, 0.0]]), 1).tolist()
    [[4.0], [1.0]]
    """
    if not x.numel():
        return x.new_ones(())
    largest = x.abs().amax(dim, keepdim=True)
    return torch.where(largest == 0, 1, largest)


def over_largest(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Divide ``x`` by its largest absolute value along ``dim``, so that products of its entries do not overflow.

    >>> over_largest(torch.tensor([1e30, -2e30]), 0).tolist()
    [0.5, -1.0]
    """
    return x / largest_entry(x, dim)


def _top_of_power(gram: Tensor) -> Tensor:
    """The leading eigenvector (R,) of a Gram matrix by repeated squaring; zero if the matrix is."""
    for _ in range(_SQUARINGS):
        gram = _scaled(gram)[0]
        gram = gram @ gram
    column = gram.diagonal().argmax(0, keepdim=True)
    return _unit(_scaled(gram)[0].index_select(1, column)[:, 0])


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

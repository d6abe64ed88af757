"""Penalty on rows of the routing matrix that are not orthonormal.

With orthogonal initialisation in place of a balancing loss: Omi et al., "Load Balancing Mixture of Experts with
Similarity Preserving Routers" (SimBal), arXiv 2506.14038 (entrywise L1 there; the squared form is the default here).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spectralmoe.errors import UserError, one_of
from spectralmoe.linalg import without_autocast
from spectralmoe.sharding import full
from spectralmoe.tape import Record

__all__ = ["orthonormality"]


def orthonormality(record: Record, *, form: Literal["square", "l1"] = "square") -> Tensor:
    r""":math:`\|M M^\top - I\|_F^2` ("square") or :math:`\|M M^\top - I\|_1` ("l1") of the routing matrix M (E, D).

    For E > D the Gram matrix of the columns is used, the side that can be orthonormal. Inert for a matrix that a
    retraction keeps orthonormal.

    Raises:
        UserError: the scorer has no routing matrix; an unknown form.
    """
    if record.matrix is None:
        raise UserError(f"layer {record.name!r} has no routing matrix for orthonormality to look at")
    defect = _defect(full(record.matrix))
    if form == "square":
        return defect.square().sum()
    if form == "l1":
        return defect.abs().sum()
    raise one_of("form of orthonormality", form, ["square", "l1"])


@without_autocast
def _defect(matrix: Tensor) -> Tensor:
    """The smaller Gram matrix less the identity."""
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)

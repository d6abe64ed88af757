"""Orthonormality: a term that makes the rows of the routing matrix orthonormal.

Omi et al., "Load Balancing Mixture of Experts with Similarity Preserving Routers" (SimBal), arXiv 2506.14038, who use
it with an orthogonal start instead of a balancing loss. Differs: the squared form is the default; theirs is the
entrywise L1 norm.
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
    r"""Measure how far the routing matrix M (E, D) is from orthonormal rows: :math:`\|M M^\top - I\|_F^2`.

    ``form="l1"`` takes the sum of the absolute entries, :math:`\|M M^\top - I\|_1`. For E > D the rows cannot be
    orthonormal, so the columns are taken, :math:`M^\top M`. A matrix that is kept orthonormal after each step gives 0.

    Raises:
        UserError: the scorer has no routing matrix, or the form is unknown.

    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
    >>> layer = MoE(Router(LinearScorer(4, 2), TopK(1)), FeedForward(2, 4, 8))
    >>> _ = layer.router.scorer.weight.data.copy_(torch.eye(2, 4) * 2)
    >>> with record(layer) as tape:
    ...     _ = layer(torch.randn(3, 4))
    >>> orthonormality(tape[0]).item(), orthonormality(tape[0], form="l1").item()  # the diagonal is 4 and not 1
    (18.0, 6.0)
    """
    if record.matrix is None:
        raise UserError(
            f"orthonormality: the scorer of layer {record.name!r} has no routing matrix; use another scorer, such as "
            "LinearScorer, or name the layers with Term(layers=...)"
        )
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

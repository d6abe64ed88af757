"""Spectral terms on the routing matrix: a bound on the slope, a reward for using all directions.

Delibasoglu, "Spectral Manifold Regularization for Stable and Modular Routing in Deep MoE Architectures" (SR-MoE),
arXiv 2601.03889: a two-part penalty on each layer's routing weights, spectral norm and stable rank. The paper's
abstract names the parts, not their formulas: the form is an option here, the default a hinge at 1.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from spectralmoe import linalg
from spectralmoe.errors import UserError, one_of
from spectralmoe.tape import Record

__all__ = ["spectral_norm", "stable_rank"]

NormForm = Literal["hinge", "two-sided", "square", "plain"]
RankForm = Literal["deficit", "inverse", "target"]


def spectral_norm(record: Record, *, bound: float = 1.0, form: NormForm = "hinge") -> Tensor:
    r"""Penalty on the largest singular value of the routing matrix M (E, D).

    "hinge": :math:`(\sigma_1 - c)_+^2`; "two-sided": :math:`(\sigma_1 - c)^2`; "square": :math:`\sigma_1^2`;
    "plain": :math:`\sigma_1`. Exact up to ``linalg.EXACT_LIMIT``, by warm-started power iteration beyond.

    Raises:
        UserError: the scorer has no routing matrix; an unknown form.

    >>> import torch
    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
    >>> layer = MoE(Router(LinearScorer(4, 2), TopK(1)), FeedForward(2, 4, 8))
    >>> _ = layer.router.scorer.weight.data.copy_(torch.eye(2, 4) * 3)
    >>> with record(layer) as tape:
    ...     _ = layer(torch.randn(3, 4))
    >>> round(spectral_norm(tape[0]).item(), 4)
    4.0
    """
    matrix, direction = _matrix(record)
    sigma = linalg.sigma_max(matrix, direction)
    if form == "hinge":
        return (sigma - bound).clamp_min(0).square()
    if form == "two-sided":
        return (sigma - bound).square()
    if form == "square":
        return sigma.square()
    if form == "plain":
        return sigma
    raise one_of("form of spectral_norm", form, ["hinge", "two-sided", "square", "plain"])


def stable_rank(record: Record, *, form: RankForm = "deficit", target: float | None = None) -> Tensor:
    r"""Penalty on a low stable rank :math:`r_s = \|M\|_F^2 / \sigma_1^2` of the routing matrix M (E, D).

    "deficit": :math:`1 - r_s / \min(E, D)`, 0 for equal-norm orthogonal rows, 1 for a zero matrix;
    "inverse": :math:`1 / r_s` (of a zero matrix: 1); "target": :math:`(r^* - r_s)_+^2`. Scaling M changes none of
    them: bound its size with ``spectral_norm``.

    Raises:
        UserError: the scorer has no routing matrix; an unknown form; "target" without a target.
    """
    matrix, direction = _matrix(record)
    rank = linalg.stable_rank(matrix, direction)
    if form == "deficit":
        return 1 - rank / min(matrix.shape)
    if form == "inverse":
        return 1 / rank.clamp_min(1)
    if form == "target":
        if target is None:
            raise UserError("stable_rank(form='target') needs target=, the stable rank to reach")
        return (target - rank).clamp_min(0).square()
    raise one_of("form of stable_rank", form, ["deficit", "inverse", "target"])


def _matrix(record: Record) -> tuple[Tensor, Tensor | None]:
    """The layer's routing matrix in at least fp32, and the kept leading direction if it is a large one."""
    matrix, scorer = record.matrix, record.scorer
    if matrix is None or scorer is None:
        kind = "no router" if scorer is None else type(scorer).__name__
        raise UserError(f"layer {record.name!r} ({kind}) has no routing matrix for a spectral term to look at")
    return linalg.full(matrix), scorer.spectral_direction()

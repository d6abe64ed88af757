r"""Spectral terms: penalties on a large spectral norm and on a low stable rank of the routing matrix.

Delibasoglu, "Spectral Manifold Regularization for Stable and Modular Routing in Deep MoE Architectures" (SR-MoE),
arXiv 2601.03889: a two-part penalty on each layer's routing weights, spectral norm and stable rank. The paper's
abstract names the parts, not their formulas. Here the form is an option, and the default is a hinge at 1.

"Routing weights" can mean more than one matrix M, so the argument ``matrix`` says which:

- "router": the scorer's matrix (E, D). :math:`\sigma_1` bounds the slope of the logits; a high stable rank means that
  experts read different directions. This needs no tokens.
- "gates": the gates of the batch, :math:`M = P \sqrt{E / N}` (N, E), with P the scores of the N real tokens normalised
  to sum 1, so :math:`\sigma_1^2 = E \, \lambda_1(P^\top P / N)`. It is 1 if and only if the mean gate of every expert
  is 1/E, and at most E, where one expert takes all: :math:`\sigma_1` measures the load. The stable rank lies between 1,
  where all tokens have the same gates, and E, where gates are one-hot and even: it measures sharpness.
- a function from a ``Record`` to a matrix of your own, for instance the weight of the layer before the router.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from spectralmoe import linalg
from spectralmoe.errors import UserError, one_of
from spectralmoe.sharding import full
from spectralmoe.tape import Record

__all__ = ["spectral_norm", "spectral_penalty", "stable_rank"]

NormForm = Literal["hinge", "two-sided", "square", "plain"]
RankForm = Literal["deficit", "inverse", "target"]
Matrix = Literal["router", "gates"] | Callable[[Record], Tensor]


def spectral_norm(record: Record, *, bound: float = 1.0, form: NormForm = "hinge", matrix: Matrix = "router") -> Tensor:
    r"""Penalise the largest singular value :math:`\sigma_1` of the routing matrix M.

    The forms are "hinge", :math:`(\sigma_1 - c)_+^2`; "two-sided", :math:`(\sigma_1 - c)^2`; "square",
    :math:`\sigma_1^2`; and "plain", :math:`\sigma_1`. It is computed anew at each call.

    Args:
        bound: c.
        form: "hinge", "two-sided", "square" or "plain".
        matrix: which matrix M is. "router": the scorer's (E, D). "gates": the batch's gates (N, E), with
            :math:`\sigma_1` from 1 for an even load to :math:`\sqrt E`, and 0 without a real token. Or a function from
            the record to a matrix. The module's docstring says more.

    Raises:
        UserError: the scorer has no routing matrix, form or matrix is unknown, or the function returns no matrix.

    >>> import torch
    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
    >>> layer = MoE(Router(LinearScorer(4, 2), TopK(1)), FeedForward(2, 4, 8))
    >>> _ = layer.router.scorer.weight.data.copy_(torch.eye(2, 4) * 3)
    >>> with record(layer) as tape:
    ...     _ = layer(torch.randn(3, 4))
    >>> round(spectral_norm(tape[0]).item(), 4)
    4.0
    """
    return _norm(linalg.sigma_max(_matrix(record, matrix)), bound, form)


def stable_rank(
    record: Record, *, form: RankForm = "deficit", target: float | None = None, matrix: Matrix = "router"
) -> Tensor:
    r"""Penalise a low stable rank :math:`r_s = \|M\|_F^2 / \sigma_1^2` of the routing matrix M.

    The forms are "deficit", :math:`1 - r_s / r_{\max}`, with :math:`r_{\max}` the smaller side of M, or E for gates: it
    is 0 for orthogonal rows of equal norm and 1 for a zero matrix; "inverse", :math:`1 / r_s`, and 1 for a zero matrix;
    and "target", :math:`(r^* - r_s)_+^2`. The scale of M changes none of them; ``spectral_norm`` bounds it.

    Args:
        form: "deficit", "inverse" or "target".
        target: :math:`r^*`, for the form "target".
        matrix: which matrix M is, as in ``spectral_norm``; gates without a real token are a zero matrix.

    Raises:
        UserError: the scorer has no routing matrix, form or matrix is unknown, the function returns no matrix, or form
            is "target" without a target.

    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
    >>> layer = MoE(Router(LinearScorer(4, 4), TopK(1)), FeedForward(4, 4, 8))
    >>> _ = layer.router.scorer.weight.data.copy_(torch.eye(4) * 100)
    >>> with record(layer) as tape:
    ...     _ = layer(torch.eye(4))  # each token to an expert of its own
    >>> round(stable_rank(tape[0], matrix="gates").item(), 4)
    0.0
    """
    whole = _matrix(record, matrix)
    rank = linalg.stable_rank(whole)
    if form == "deficit":
        return 1 - rank / _largest_rank(whole, matrix)
    if form == "inverse":
        return 1 / rank.clamp_min(1)
    if form == "target":
        if target is None:
            raise UserError("stable_rank(form='target') needs target=, the stable rank to reach")
        return (target - rank).clamp_min(0).square()
    raise one_of("form of stable_rank", form, ["deficit", "inverse", "target"])


def spectral_penalty(
    record: Record,
    *,
    norm: float = 1.0,
    rank: float = 1.0,
    bound: float = 1.0,
    form: NormForm = "hinge",
    matrix: Matrix = "router",
) -> Tensor:
    r"""Penalise spectral norm and stable rank together: :math:`a (\sigma_1 - c)_+^2 + b (1 - r_s / r_{\max})`.

    It is ``norm`` times ``spectral_norm`` plus ``rank`` times ``stable_rank`` in its default form, and computes the
    spectrum once.

    Args:
        norm, rank: a and b.
        bound, form, matrix: as in ``spectral_norm``.

    Raises:
        UserError: the scorer has no routing matrix, form or matrix is unknown, or the function returns no matrix.

    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
    >>> layer = MoE(Router(LinearScorer(4, 2), TopK(1)), FeedForward(2, 4, 8))
    >>> _ = layer.router.scorer.weight.data.copy_(torch.eye(2, 4) * 3)
    >>> with record(layer) as tape:
    ...     _ = layer(torch.randn(3, 4))
    >>> round(spectral_penalty(tape[0], norm=0.5).item(), 4)
    2.0
    """
    whole = _matrix(record, matrix)
    sigma, stable = linalg.spectrum(whole)
    return norm * _norm(sigma, bound, form) + rank * (1 - stable / _largest_rank(whole, matrix))


def _norm(sigma: Tensor, bound: float, form: NormForm) -> Tensor:
    if form == "hinge":
        return (sigma - bound).clamp_min(0).square()
    if form == "two-sided":
        return (sigma - bound).square()
    if form == "square":
        return sigma.square()
    if form == "plain":
        return sigma
    raise one_of("form of spectral_norm", form, ["hinge", "two-sided", "square", "plain"])


def _largest_rank(whole: Tensor, matrix: Matrix) -> int:
    """What the stable rank can reach; for gates E, however many tokens there are."""
    return whole.shape[1] if matrix == "gates" else min(whole.shape)


def _matrix(record: Record, matrix: Matrix) -> Tensor:
    """The matrix in at least fp32."""
    if matrix == "router":
        return _router(record)
    if matrix == "gates":
        return _gates(record)
    if not callable(matrix):
        raise one_of("matrix of a spectral term", matrix, ["router", "gates", "a function of the record"])
    given = full(matrix(record))
    if given.dim() != 2:
        raise UserError(f"the function given as matrix must return a matrix, got shape {tuple(given.shape)}")
    return given.to(torch.promote_types(given.dtype, torch.float32))


def _router(record: Record) -> Tensor:
    """The scorer's matrix (E, D)."""
    matrix, scorer = record.matrix, record.scorer
    if matrix is None:
        kind = "no router" if scorer is None else type(scorer).__name__
        raise UserError(
            f"layer {record.name!r} ({kind}) has no routing matrix for a spectral term; use matrix='gates', another "
            "scorer, or name the layers with Term(layers=...)"
        )
    return full(matrix)


def _gates(record: Record) -> Tensor:
    """The gates times sqrt(E / N) (N, E); rows of tokens that are not real are zero and not counted in N."""
    routing, probs = record.routing, record.routing.probs
    if routing.mask is None:
        return probs * math.sqrt(routing.num_experts / max(len(probs), 1))
    count = routing.mask.sum().clamp_min(1).to(probs.dtype)
    return torch.where(routing.mask[:, None], probs, 0) * (routing.num_experts / count).sqrt()

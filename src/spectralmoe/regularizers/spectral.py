r"""Spectral terms on the routing matrix: a bound on the slope, a reward for using all directions.

Delibasoglu, "Spectral Manifold Regularization for Stable and Modular Routing in Deep MoE Architectures" (SR-MoE),
arXiv 2601.03889: a two-part penalty on each layer's routing weights, spectral norm and stable rank. The paper's
abstract names the parts, not their formulas: the form is an option here, the default a hinge at 1.

"Routing weights" may be read in more than one way, so ``matrix`` says what M is:

- "router": the scorer's matrix (E, D). :math:`\sigma_1` bounds the slope of the logits, the stable rank asks for
  experts that look at different directions. Needs no tokens.
- "gates": the batch's gates :math:`M = P \sqrt{E / N}` (N, E), P the scores of the N real tokens normalised to sum 1,
  so :math:`\sigma_1^2 = E \, \lambda_1(P^\top P / N)`. It lies between 1, if and only if the mean gate of every expert
  is 1/E, and E, where one expert takes all: :math:`\sigma_1` is a load term. The stable rank, which P shares, lies
  between 1, where all tokens are gated alike, and E, where gates are one-hot and even: it asks for sharpness.
- a function record -> Tensor: a matrix of your own, for instance the weight of the layer before the router.
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
    r"""Penalty on the largest singular value of the routing matrix M.

    "hinge": :math:`(\sigma_1 - c)_+^2`; "two-sided": :math:`(\sigma_1 - c)^2`; "square": :math:`\sigma_1^2`;
    "plain": :math:`\sigma_1`. Exact; the scorer's matrix beyond ``linalg.EXACT_LIMIT`` by warm-started power iteration.

    Args:
        bound: c.
        matrix: what M is: "router" (E, D), "gates" (N, E; :math:`\sigma_1` from 1 for an even load to
            :math:`\sqrt E`, and 0 without a real token), or a function record -> (any, any). See the module.

    Raises:
        UserError: the scorer has no routing matrix; an unknown form or matrix; a function that gives no matrix.

    >>> import torch
    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
    >>> layer = MoE(Router(LinearScorer(4, 2), TopK(1)), FeedForward(2, 4, 8))
    >>> _ = layer.router.scorer.weight.data.copy_(torch.eye(2, 4) * 3)
    >>> with record(layer) as tape:
    ...     _ = layer(torch.randn(3, 4))
    >>> round(spectral_norm(tape[0]).item(), 4)
    4.0
    """
    return _norm(linalg.sigma_max(*_matrix(record, matrix)), bound, form)


def stable_rank(
    record: Record, *, form: RankForm = "deficit", target: float | None = None, matrix: Matrix = "router"
) -> Tensor:
    r"""Penalty on a low stable rank :math:`r_s = \|M\|_F^2 / \sigma_1^2` of the routing matrix M.

    "deficit": :math:`1 - r_s / r_{\max}`, where :math:`r_{\max}` is the smaller side of M, for gates E: 0 for
    equal-norm orthogonal rows, 1 for a zero matrix; "inverse": :math:`1 / r_s` (of a zero matrix: 1); "target":
    :math:`(r^* - r_s)_+^2`. Scaling M changes none of them: bound its size with ``spectral_norm``.

    Args:
        target: :math:`r^*`.
        matrix: what M is: "router" (E, D), "gates" (N, E; zero without a real token), or a function
            record -> (any, any). See the module.

    Raises:
        UserError: the scorer has no routing matrix; an unknown form or matrix; a function that gives no matrix;
            "target" without a target.

    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
    >>> layer = MoE(Router(LinearScorer(4, 4), TopK(1)), FeedForward(4, 4, 8))
    >>> _ = layer.router.scorer.weight.data.copy_(torch.eye(4) * 100)
    >>> with record(layer) as tape:
    ...     _ = layer(torch.eye(4))  # each token to an expert of its own
    >>> round(stable_rank(tape[0], matrix="gates").item(), 4)
    0.0
    """
    whole, direction = _matrix(record, matrix)
    rank = linalg.stable_rank(whole, direction)
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
    r"""Both parts from one decomposition: with the hinge :math:`a (\sigma_1 - c)_+^2 + b (1 - r_s / r_{\max})`.

    The weighted sum of ``spectral_norm`` and of ``stable_rank`` in its default form, at little more than half their
    cost.

    Args:
        norm, rank: a and b.
        bound, form, matrix: as in ``spectral_norm``.

    Raises:
        UserError: the scorer has no routing matrix; an unknown form or matrix; a function that gives no matrix.

    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
    >>> layer = MoE(Router(LinearScorer(4, 2), TopK(1)), FeedForward(2, 4, 8))
    >>> _ = layer.router.scorer.weight.data.copy_(torch.eye(2, 4) * 3)
    >>> with record(layer) as tape:
    ...     _ = layer(torch.randn(3, 4))
    >>> round(spectral_penalty(tape[0], norm=0.5).item(), 4)
    2.0
    """
    whole, direction = _matrix(record, matrix)
    sigma, stable = linalg.spectrum(whole, direction)
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


def _matrix(record: Record, matrix: Matrix) -> tuple[Tensor, Tensor | None]:
    """The matrix in at least fp32, and its leading right direction where that is kept (None: find it)."""
    if matrix == "router":
        return _router(record)
    if matrix == "gates":
        return _gates(record), None
    if not callable(matrix):
        raise one_of("matrix of a spectral term", matrix, ["router", "gates", "a function of the record"])
    given = full(matrix(record))
    if given.dim() != 2:
        raise UserError(f"the function given as matrix must return a matrix, got shape {tuple(given.shape)}")
    return given.to(torch.promote_types(given.dtype, torch.float32)), None


def _router(record: Record) -> tuple[Tensor, Tensor | None]:
    """The scorer's matrix (E, D) and, if it is a large one, the leading direction it keeps."""
    matrix, scorer = record.matrix, record.scorer
    if matrix is None:
        kind = "no router" if scorer is None else type(scorer).__name__
        raise UserError(f"layer {record.name!r} ({kind}) has no routing matrix for a spectral term to look at")
    return full(matrix), None if scorer is None else scorer.spectral_direction()


def _gates(record: Record) -> Tensor:
    """The gates times sqrt(E / N) (N, E); rows of tokens that are not real are zero and not counted in N."""
    routing, probs = record.routing, record.routing.probs
    if routing.mask is None:
        return probs * math.sqrt(routing.num_experts / max(len(probs), 1))
    count = routing.mask.sum().clamp_min(1).to(probs.dtype)
    return torch.where(routing.mask[:, None], probs, 0) * (routing.num_experts / count).sqrt()

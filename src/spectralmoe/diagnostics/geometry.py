r"""Geometry of a router: the spectrum and the rows of its matrix, and how fast the scores change with the token.

The functions take a routing matrix A (E, D), one row for each expert, and compute in float64. For a matrix with values
that are not finite there is no data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from spectralmoe import linalg
from spectralmoe.diagnostics.measure import Measure
from spectralmoe.diagnostics.watch import Watched
from spectralmoe.routing import Routing
from spectralmoe.sharding import full

__all__ = [
    "effective_rank",
    "jacobian_norm",
    "row_cosine",
    "row_cosines",
    "row_spread",
    "sigma_1",
    "spectrum",
    "stable_rank",
]

_CHUNK = 16
_AFFINE = 1e-3


def sigma_1(matrix: Tensor) -> Measure:
    r"""Compute the largest singular value :math:`\sigma_1(A)`, a bound on the slope of linear logits.

    >>> str(sigma_1(torch.diag(torch.tensor([3.0, 1.0]))))
    '3 (4 weights)'
    """
    return _measure(matrix, linalg.sigma_max)


def stable_rank(matrix: Tensor) -> Measure:
    r"""Compute the stable rank :math:`\|A\|_F^2/\sigma_1^2`: 1 to min(E, D); 0 for a zero matrix.

    >>> str(stable_rank(torch.eye(4)))
    '4 (16 weights)'
    """
    return _measure(matrix, linalg.stable_rank)


def effective_rank(matrix: Tensor) -> Measure:
    r"""Compute the effective rank :math:`\exp H(\sigma/\sum_i \sigma_i)`: 1 to the rank; 0 for a zero matrix.

    Roy & Vetterli, "The effective rank", EUSIPCO 2007.

    >>> round(effective_rank(torch.eye(5)).value, 5)
    5.0
    """

    def rank(m: Tensor) -> Tensor:
        values = spectrum(m)
        shares = values / values.sum()
        return torch.where(values.sum() > 0, (-torch.xlogy(shares, shares).sum()).exp(), 0)

    return _measure(matrix, rank)


def spectrum(matrix: Tensor) -> Tensor:
    """Compute all min(E, D) singular values, the largest first, in float64; nan if the matrix is not finite."""
    m = _exact(matrix)
    if not m.isfinite().all():
        return m.new_full((min(m.shape),), math.nan)
    values: Tensor = torch.linalg.svdvals(m)
    return values


def row_cosine(matrix: Tensor) -> Measure:
    """Compute the mean of |cos| over all pairs of rows: 0 for orthogonal rows, 1 for parallel ones.

    With fewer than two rows there is no data.
    """

    def mean(m: Tensor) -> Tensor:
        i, j = torch.triu_indices(len(m), len(m), 1, device=m.device)
        return row_cosines(m)[i, j].abs().mean()

    return _measure(matrix, mean)


def row_cosines(matrix: Tensor) -> Tensor:
    """Compute the cosine of each pair of rows (E, E), in float64; 0 for a row of zeros.

    >>> row_cosines(torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 0.0]])).tolist()
    [[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    m = linalg.over_largest(_exact(matrix), -1)
    norms = m.norm(dim=-1, keepdim=True)
    rows = m / torch.where(norms == 0, 1, norms)
    return rows @ rows.T


def row_spread(matrix: Tensor) -> Measure:
    r"""Measure how much the rows differ from their mean: :math:`\|A - 1 \bar a^\top\|_F/\|A\|_F`, 0 to 1.

    What all rows have in common adds the same to every logit, so with a spread of 0 all experts get the same logits for
    every token. It is 0 for a zero matrix and for one without columns. With fewer than two rows there is no data.

    >>> row_spread(torch.ones(4, 8)).value, row_spread(torch.eye(2)).value < 1
    (0.0, True)
    """
    m = linalg.over_largest(_exact(matrix), (0, 1))
    size = m.norm()
    spread = (m - m.mean(0)).norm() / size if size > 0 else size
    return Measure.of(spread, len(m), "rows", needs=2)


def jacobian_norm(layer: Watched, x: Tensor) -> Measure:
    r"""Compute the mean over tokens x (N, D) of the spectral norm of :math:`J = \partial p/\partial x`.

    p are the scores normalised to sum 1. The value says how much they change with a small step of the token, on data
    and not in the worst case. Novak et al., arXiv 1802.08760, section 3, measure the sensitivity of a network like
    this, with the Frobenius norm.

    If the layer behaves as a softmax (d = p) or a sigmoid (:math:`d = p\,(1 - \sigma(s))`) of logits
    :math:`s = Ax + b`, A its ``matrix``, J is computed as :math:`(\mathrm{diag}(d) - p\,d^\top) A`. Otherwise it is
    differentiated, if ``layer.route`` passes a gradient; else there is no data. That costs E backward passes of the
    router, so take a few dozen tokens. Tokens in half precision are routed in fp32.
    """
    tokens = x.detach().to(precise := torch.promote_types(x.dtype, torch.float32))
    route = partial(layer.route, dtype=None if x.dtype == precise else precise)
    chunks = [_norms(layer, route, part) for part in tokens.split(_CHUNK) if len(part)]
    norms = [norm for norm in chunks if norm is not None]
    if not norms or len(norms) < len(chunks):
        return Measure.of(math.nan, 0)
    return Measure.of(torch.cat(norms).mean(), len(x))


def _norms(layer: Watched, route: Callable[[Tensor], Routing], x: Tensor) -> Tensor | None:
    """Spectral norms of the Jacobians (N,), from J J' (N, E, E)."""
    gram = _affine_gram(layer, route, x)
    gram = _traced_gram(route, x) if gram is None else gram
    if gram is None or not gram.isfinite().all():
        return None
    squares: Tensor = torch.linalg.eigvalsh(gram)[:, -1]
    return squares.clamp_min(0).sqrt()


def _traced_gram(route: Callable[[Tensor], Routing], x: Tensor) -> Tensor | None:
    """J J' (N, E, E) by differentiation; None where no gradient passes."""
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        probs = route(x).probs
        sums = probs.sum(0).unbind() if probs.requires_grad else ()
        rows = [torch.autograd.grad(s, x, retain_graph=True, allow_unused=True)[0] for s in sums]
    if not rows or any(row is None for row in rows):
        return None
    jacobian = torch.stack(rows, 1).double()
    return jacobian @ jacobian.mT


@torch.no_grad()
def _affine_gram(layer: Watched, route: Callable[[Tensor], Routing], x: Tensor) -> Tensor | None:
    """J J' (N, E, E) of a softmax or sigmoid of A x + b; None where the layer shows that it is neither.

    It is asked at x, at 0, and where the rows of A give large logits.
    """
    matrix = None if layer.matrix is None else _exact(layer.matrix)
    if matrix is None or matrix.shape != (layer.num_experts, x.shape[1]):
        return None
    rows = 4 * matrix / matrix.square().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    routing = route(probes := torch.cat([x, rows.to(x), torch.zeros_like(x[:1])]))
    logits, probs, expected = routing.logits.double(), routing.probs.double(), probes.double() @ matrix.T
    excess = logits - logits[-1] - expected
    soft, gates = logits.softmax(-1), logits.sigmoid()
    if _small(probs - soft, soft) and _small(_centred(excess), _centred(expected)):
        p = slope = soft[: len(x)]
    elif _small(probs - (even := gates / gates.sum(-1, keepdim=True)), even) and _small(excess, expected):
        p, slope = even[: len(x)], (even * (1 - gates))[: len(x)]
    else:
        return None
    inner = torch.diag_embed(slope) - p[:, :, None] * slope[:, None, :]  # of p in the logits
    return inner @ (matrix @ matrix.T) @ inner.mT


def _small(error: Tensor, size: Tensor) -> bool:
    return bool(error.norm() <= _AFFINE * size.norm())


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(-1, keepdim=True)


def _exact(matrix: Tensor) -> Tensor:
    return full(matrix).detach().double()


def _measure(matrix: Tensor, value: Callable[[Tensor], Tensor]) -> Measure:
    m = _exact(matrix)
    known = m.numel() > 0 and bool(m.isfinite().all())
    return Measure.of(value(m) if known else math.nan, m.numel(), "weights")

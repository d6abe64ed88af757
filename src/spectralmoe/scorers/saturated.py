"""Saturated gate: bounded inner products in a low-rank space, the router of L2R.

Yang, Togo, Li, Ogawa & Haseyama, "L2R: Low-Rank and Lipschitz-Controlled Routing for Mixture-of-Experts", arXiv
2601.21349, section on saturated inner-product scoring; authors' code: announced, not found. The paper names the parts
(a shared projection, a bounded factor of the query's norm, several light anchors for each expert); both factors are our
choice. Differs: gamma and beta are learned as logarithms, so that phi stays positive and the experts are ordered as
their cosines are; the projection starts so small that tokens of unit variance are not saturated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.context import Rows
from spectralmoe.errors import UserError, check_whole, one_of
from spectralmoe.linalg import sigma_max
from spectralmoe.scorers.base import Scorer, gamma, half_space_distance
from spectralmoe.sharding import full

__all__ = ["SaturatedScorer"]

_SATURATIONS = ("tanh", "affine")
_SLOPE = 0.25  # of psi
_EPS = 1e-12


class SaturatedScorer(Scorer):
    r"""Scores experts by bounded inner products of a low-rank query with A learned anchors of each expert.

    .. math::
        q = W x,\quad z_{ia} = \varphi(\|q\|)\,\psi(\|k_{ia}\|)\,\cos(q, k_{ia}),\quad s_i = \log\sum_a e^{z_{ia}}

    W is (R, D), the anchors k are (E, A, R), and :math:`\psi(n) = 1 + (n - 1)/4`. The factor phi of the query's norm is
    bounded:

    - ``"tanh"``: :math:`\varphi(n) = \gamma\tanh n`. The logits are :math:`\gamma\,\sigma_1(\Psi\hat K)\,\sigma_1(W)`
      -Lipschitz in x, the rows of :math:`\Psi\hat K` being :math:`\psi(\|k_{ia}\|)\,k_{ia}/\|k_{ia}\|`.
    - ``"affine"``: :math:`\varphi(n) = \gamma(1 + \beta\tanh n)`, affine in tanh. It is not 0 at n = 0, so the logits
      jump where q = 0 and have no Lipschitz constant.

    With one anchor, phi scales all logits of a token alike: top-k chooses as the linear gate with the rows ``matrix``
    does, ``flip_distance`` is exact, and x -> c x changes the weights and not the choice. With A anchors a logit is
    between the largest of its :math:`z_{ia}` and that plus log A.

    For tokens of unit variance :math:`\|q\|` starts near 1, where tanh is not saturated; anchors start at norm about 1.

    Args:
        rank: R, the width of queries and anchors. More than R anchors of all experts together cannot be orthogonal.
        anchors: A, how many each expert has.
        saturation: "tanh" or "affine".
        gain: the start of gamma > 0. gamma is learned, and so is beta > 0, which starts at 1.

    Raises:
        UserError: an argument is out of range, or ``saturation`` is unknown.

    >>> scorer = SaturatedScorer(16, 4, rank=8)
    >>> x = torch.randn(5, 16)
    >>> scorer(x).argmax(-1).equal((x @ scorer.matrix.T).argmax(-1)), scorer.lipschitz() > 0
    (True, True)
    """

    rows = ("keys",)

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        rank: int = 16,
        anchors: int = 1,
        saturation: str = "tanh",
        gain: float = 1.0,
    ) -> None:
        super().__init__(dim, num_experts)
        for name, value in (("rank", rank), ("anchors", anchors)):
            check_whole("SaturatedScorer", name, value)
        if saturation not in _SATURATIONS:
            raise one_of("saturation of SaturatedScorer", saturation, _SATURATIONS)
        if not 0 < gain < float("inf"):
            raise UserError(f"SaturatedScorer: gain must be positive, got {gain}")
        self.rank, self.anchors, self.saturation, self.gain = rank, anchors, saturation, gain
        self.projection = nn.Parameter(torch.randn(rank, dim) * (rank * dim) ** -0.5)
        self.keys = nn.Parameter(torch.randn(num_experts, anchors, rank) * rank**-0.5)
        self.log_gain = nn.Parameter(torch.full((1,), math.log(gain)))
        self.log_beta = nn.Parameter(torch.zeros(1)) if saturation == "affine" else None

    def forward(self, x: Tensor, *, context: Rows | None = None) -> Tensor:
        query = F.linear(x, self.projection.to(x.dtype))
        norm = torch.linalg.vector_norm(query, dim=-1, keepdim=True)
        logits = F.linear(query * self._shrink(norm), _directions(self.keys.to(x.dtype)).flatten(0, 1))
        return logits if self.anchors == 1 else logits.unflatten(1, (-1, self.anchors)).logsumexp(-1)

    def _shrink(self, norm: Tensor) -> Tensor:
        """phi(n)/n of norms n (N, 1); its limit, gamma, at 0 where phi(0) = 0."""
        factor = self.log_gain.to(norm.dtype).exp()
        if self.log_beta is not None:
            return factor * (1 + self.log_beta.to(norm.dtype).exp() * norm.tanh()) / norm.clamp_min(_EPS)
        positive = torch.where(norm > 0, norm, 1)
        return factor * torch.where(norm > 0, positive.tanh() / positive, 1)

    @property
    def matrix(self) -> Tensor | None:
        """The rows of the linear gate with the same choices (E, D); None with more than one anchor."""
        if self.anchors > 1:
            return None
        return _directions(full(self.keys)[:, 0]) @ full(self.projection)

    def lipschitz(self) -> float | None:
        """Return a Lipschitz constant of the logits, shift included; None for "affine", where they jump at q = 0."""
        if self.saturation != "tanh":
            return None
        keys, projection = full(self.keys.detach()).flatten(0, 1), full(self.projection.detach())
        gain = full(self.log_gain.detach()).exp()
        return float(gain * sigma_max(_directions(keys)) * sigma_max(projection))

    def rounding(self, x: Tensor, precision: torch.dtype) -> Tensor | None:
        r"""Return the coefficients; None for "affine".

        The query q is wrong by a share of :math:`\|W\|_F \|x\|`, and no logit changes faster with q than
        :math:`\gamma\max_a\psi_{ia}`. The sum over the anchors adds a share of the logit and of log A.
        """
        if self.saturation != "tanh":
            return None
        keys, projection, gain = (full(t).to(x.dtype) for t in (self.keys, self.projection, self.log_gain))
        slope = gain.exp() * _scale(keys).amax((1, 2)) * projection.norm()
        terms = self.dim + 3 * self.rank + 32 + (self.anchors + 8 if self.anchors > 1 else 0)
        offset = math.log(self.anchors) * gamma(self.anchors + 8, precision) + self.dim * torch.finfo(precision).tiny
        return torch.stack([torch.full_like(slope, offset), gamma(terms, precision) * slope, torch.zeros_like(slope)])

    def flip_distance(
        self, x: Tensor, over: Tensor, under: Tensor, *, precision: torch.dtype = torch.float64
    ) -> Tensor | None:
        """Return the exact distance for one anchor, else the bound by ``lipschitz()``; both less rounding.

        With one anchor the positive factor phi(|q|)/|q| is common to all experts, so the choice is that of the linear
        gate with the rows ``matrix``.
        """
        if self.anchors > 1:
            return super().flip_distance(x, over, under, precision=precision)
        keys, projection = (full(t).to(x.dtype) for t in (self.keys, self.projection))
        directions = _directions(keys[:, 0])
        zero, least = x.new_zeros(self.num_experts), self.dim * torch.finfo(precision).tiny
        sizes = (directions.abs() @ projection.abs()).norm(dim=1)
        error = torch.stack([zero + least, gamma(self.dim + 2 * self.rank + 10, precision) * sizes, zero])
        return half_space_distance(directions @ projection, zero, x, over, under, error=error)


def _scale(keys: Tensor) -> Tensor:
    """psi of the norms of ``keys`` (..., R): (..., 1)."""
    norm: Tensor = torch.linalg.vector_norm(keys, dim=-1, keepdim=True)
    return 1 + _SLOPE * (norm - 1)


def _directions(keys: Tensor) -> Tensor:
    """psi(|k|) k / |k| of ``keys`` (..., R)."""
    return _scale(keys) * F.normalize(keys, dim=-1)

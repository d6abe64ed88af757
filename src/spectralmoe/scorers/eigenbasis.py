"""Eigenbasis gate: it scores experts by how a token's energy is shared among orthonormal directions.

Cheng et al., "Eigenbasis-Guided Routing for Mixture-of-Experts" (EMoE), arXiv 2601.12137, section on routing.
Authors' code: github.com/Belis0811/EMoE (no licence; this file is written from the equations). Differs: the basis is
put back on the manifold after the optimizer step, never inside forward, and with the signs of its columns kept, so
that momentum stays valid; so there is no orthonormality penalty, which would be zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spectralmoe.context import Rows
from spectralmoe.errors import UserError
from spectralmoe.linalg import qr_retraction, sigma_max
from spectralmoe.scorers.base import Scorer, gamma
from spectralmoe.sharding import full
from spectralmoe.stacks import chosen_experts

__all__ = ["EigenbasisScorer"]

_BISECTIONS = 50


class EigenbasisScorer(Scorer):
    r"""Scores experts by the energy of x along R learned orthonormal directions, which all experts share.

    .. math::
        z = U^\top x,\quad e_j = \frac{z_j^2}{\sum_m z_m^2 + \epsilon},\quad
        s_k = \frac1\tau \Big(\sum_j \gamma_j \pi_{jk} e_j + b_k\Big)

    U (D, R) has orthonormal columns. The masks pi (R, E) say how much each direction counts for each expert; row j is
    a softmax over the experts. The gain gamma (R,) starts at 1 and the bias b (E,) at 0. The routing of -x is that of
    x, and so is that of c x, as long as the energy is far above eps.

    U is learned like any weight and made orthonormal again after each optimizer step (``attach`` or ``after_step``).

    Args:
        rank: R, 1 to D.
        temperature: tau > 0. Before the division the logits lie near 1/E, so with 1.0 the scores start near uniform.
        eps: epsilon >= 0, which keeps a zero token from a division by zero.

    Raises:
        UserError: rank is not 1 to D, the temperature is not positive, or eps is negative.

    >>> scorer = EigenbasisScorer(16, 4, rank=8)
    >>> x = torch.randn(5, 16)
    >>> torch.allclose(scorer(x), scorer(-2 * x), atol=1e-5)
    True
    """

    manifold = ("basis",)

    def __init__(self, dim: int, num_experts: int, *, rank: int, temperature: float = 1.0, eps: float = 1e-6) -> None:
        super().__init__(dim, num_experts)
        if not 1 <= rank <= dim:
            raise UserError(f"EigenbasisScorer: rank R must be between 1 and D={dim}, got {rank}")
        if not 0 < temperature < float("inf"):
            raise UserError(f"EigenbasisScorer: temperature must be positive, got {temperature}")
        if not eps >= 0:
            raise UserError(f"EigenbasisScorer: eps must not be negative, got {eps}")
        self.rank, self.temperature, self.eps = rank, temperature, eps
        self.basis = nn.Parameter(qr_retraction(torch.randn(dim, rank)))
        self.mask_logits = nn.Parameter(torch.randn(rank, num_experts))
        self.gain = nn.Parameter(torch.ones(rank))
        self.bias = nn.Parameter(torch.zeros(num_experts))

    def energies(self, x: Tensor) -> Tensor:
        """Return the energy shares e (N, R) of the tokens x (N, D); each row sums to 1 (up to eps)."""
        energy = (x @ self.basis.to(x.dtype)).square()
        return energy / (energy.sum(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor, *, context: Rows | None = None) -> Tensor:
        energy = (x @ self.basis.to(x.dtype)).square()
        weights = self.gain.to(x.dtype)[:, None] * self.mask_logits.to(x.dtype).softmax(-1)
        total = (energy.sum(-1, keepdim=True) + self.eps).clamp_min(torch.finfo(x.dtype).tiny)  # eps and x may be 0
        shares = energy @ weights / total  # E divisions a token instead of R
        return (shares + self.bias.to(x.dtype)) / self.temperature

    def select(self, indices: Sequence[int] | Tensor) -> EigenbasisScorer:
        """Return a scorer of these experts; they keep their logits.

        The masks are a softmax over all experts, so the share of those that are left goes into the gain.
        """
        chosen = chosen_experts("EigenbasisScorer.select", indices, self.num_experts)
        masks, gain, bias = self.mask_logits.detach(), self.gain.detach(), self.bias.detach()
        share = masks.double().softmax(-1)[:, chosen].sum(-1)
        tensors: dict[Tensor, Tensor] = {self.mask_logits: masks[:, chosen], self.gain: gain * share}
        return self._cut(chosen, tensors | {self.bias: bias[chosen]})

    @property
    def matrix(self) -> Tensor:
        """The linear map from energy shares to logits before the temperature: (E, R), entries gamma_j pi_jk."""
        return (self.gain[:, None] * self.mask_logits.softmax(-1)).T

    def flip_distance(
        self, x: Tensor, over: Tensor, under: Tensor, *, precision: torch.dtype = torch.float64
    ) -> Tensor:
        r"""Return the distance to the quadric on which two logits tie, less rounding; exact for an orthonormal U.

        Multiplied by the positive :math:`\tau(\|z\|^2 + \epsilon)`, the difference of two logits is
        :math:`\sum_m c_m z_m^2 + \epsilon\,\delta` with
        :math:`c_m = \gamma_m(\pi_{mi} - \pi_{mj}) + \delta,\ \delta = b_i - b_j`. The squared distance to its zeros is
        the largest value (S-lemma) of the Lagrange dual
        :math:`\sum_m \lambda c_m z_m^2/(1 + \lambda c_m) + \lambda\epsilon\delta` over the lambda >= 0 with all
        :math:`1 + \lambda c_m > 0`; every such lambda gives a lower bound.

        Rounding in ``precision`` moves z by at most :math:`\eta\|x\|`, which is taken off the distance. It moves the
        two terms whose difference is c by a share of each, which is taken off c.
        """
        tensors = (self.basis, self.bias, self.matrix, self.gain)
        basis, bias, weights, gain = (full(t).to(x.dtype) for t in tensors)
        relative, tiny = gamma(self.rank + 2 * self.num_experts + 16, precision), torch.finfo(precision).tiny
        least = tiny * (self.rank + 4) * (gain.abs().amax() + bias.abs().amax())
        unsure, shift = relative * bias.abs(), (bias[over] - bias[under])[..., None]
        constant = shift - (unsure[over] + unsure[under])[..., None]
        unsure = relative * weights.abs() + gamma(1, precision) * gain.abs()
        coefficients = weights[over] - weights[under] - unsure[over] - unsure[under] + constant
        energy = (x @ basis).square()[:, None]
        distance = _distance_to_quadric(energy, coefficients, self.eps * constant - 2 * least)
        noise = gamma(self.dim + 1, precision) * basis.norm()
        left = (distance - noise * x.norm(dim=-1, keepdim=True)).clamp_min(0)
        radius: Tensor = left / (sigma_max(basis) + noise)
        return radius


def _distance_to_quadric(energy: Tensor, c: Tensor, constant: Tensor) -> Tensor:
    """How far z may move while ``sum(c * z**2) + constant`` stays positive: (..., R) twice and (..., 1) -> (...).

    The dual is concave: bisection on the sign of its derivative, with lambda = t/scale for t in [0, 1).
    """
    largest, deepest = c.abs().amax(-1, keepdim=True), (-c.amin(-1, keepdim=True)).clamp_min(0)
    low = torch.zeros_like(constant + largest)
    for step in range(1, _BISECTIONS):
        t = low + 2.0**-step
        scale, moved = (1 - t) * largest + t * deepest, (1 - t) * largest + t * (deepest + c)
        rising = (c * energy * (scale / moved).square()).sum(-1, keepdim=True) + constant > 0
        low = torch.where(rising, t, low)
    scale, moved = (1 - low) * largest + low * deepest, (1 - low) * largest + low * (deepest + c)
    square = low * ((c * energy / moved).sum(-1, keepdim=True) + constant / scale)
    always = torch.where(constant > 0, torch.inf, 0.0)  # equal experts: a constant decides
    return torch.where(largest > 0, square.clamp_min(0).sqrt(), always.to(c.dtype)).squeeze(-1)

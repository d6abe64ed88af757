r"""Principal-direction gate: every expert owns one side of a direction along which the tokens vary.

After Cheng et al., "Eigenbasis-Guided Routing for Mixture-of-Experts" (EMoE), arXiv 2601.12137: a token goes where its
energy along shared orthonormal directions lies, and no loss balances the load. ``EigenbasisScorer`` has the paper's
equations. Differs: the basis starts at the principal directions of the centred tokens; the projection on each side of
a direction is divided by its running mean, so that no direction outweighs the others; and each side belongs to one
expert for good, so that opposite tokens go to different experts. The card ``papers/emoe`` measures what each of these
is worth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.context import Rows
from spectralmoe.errors import UserError
from spectralmoe.linalg import qr_retraction, sigma_max
from spectralmoe.scorers.base import Scorer, gamma
from spectralmoe.sharding import assign_, full
from spectralmoe.stacks import chosen_experts

__all__ = ["PrincipalScorer"]

_EPS = 1e-6
_LEAST_VARIANCE = 1e-3  # of the largest: a first batch of few tokens has directions without any


class PrincipalScorer(Scorer):
    r"""Scores experts by the share of a token's energy on each side of R orthonormal directions.

    .. math::
        z = U^\top (x - \mu),\quad q_{j\pm} = \Big(\frac{\max(\pm z_j, 0)}{m_{j\pm}}\Big)^2,\quad
        e_h = \frac{q_h}{\sum_g q_g + \epsilon},\quad s_k = \frac1\tau \sum_{h \bmod E = k} e_h

    The 2R sides h are numbered from 0 in the order :math:`1+, 1-, 2+, 2-, \ldots` mu (D,) is the running mean of the
    training tokens, and m (2R,) that of :math:`\max(\pm z_j, 0)`. After the first optimizer step U (D, R) holds the
    leading eigenvectors of the tokens' covariance. From then on it is learned like any weight and made orthonormal
    again after each step. Both need ``attach`` or ``after_step``.

    Args:
        rank: R, E/2 to D; None, the default: E/2 rounded up, so that each expert owns one side (of an odd E, expert 0
            owns two).
        temperature: tau > 0.
        momentum: the weight of a new step in the running means, 0 to 1; the first 1/momentum steps count alike.
        sides: the expert of each of the 2R sides, -1 for a side without an expert; None: expert h mod E.

    Raises:
        UserError: an argument is out of range.

    >>> scorer = PrincipalScorer(16, 4)
    >>> x = torch.randn(5, 16)
    >>> scorer(-x).argmax(-1).equal(scorer(x).argmax(-1) ^ 1)  # experts 0 and 1 own the two sides of one direction
    True
    """

    manifold = ("basis",)
    streams_tokens = True

    mean: Tensor
    spread: Tensor
    updates: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        rank: int | None = None,
        temperature: float = 0.2,
        momentum: float = 0.005,
        sides: Sequence[int] | None = None,
    ) -> None:
        super().__init__(dim, num_experts)
        rank = (num_experts + 1) // 2 if rank is None else rank
        if not num_experts / 2 <= rank <= dim:
            wanted = f"at least E/2={num_experts / 2:g} and at most D={dim}"
            raise UserError(f"PrincipalScorer: rank R must be {wanted}, got {rank}")
        if not 0 < temperature < float("inf"):
            raise UserError(f"PrincipalScorer: temperature must be positive, got {temperature}")
        if not 0 < momentum <= 1:
            raise UserError(f"PrincipalScorer: momentum must be above 0 and at most 1, got {momentum}")
        if sides is not None and (len(sides) != 2 * rank or not set(sides) <= set(range(-1, num_experts))):
            raise UserError(
                f"PrincipalScorer: sides must have 2R={2 * rank} entries, each -1 or an expert below E={num_experts}"
            )
        self.rank, self.temperature, self.momentum = rank, temperature, momentum
        self.sides = None if sides is None else list(sides)
        self.basis = nn.Parameter(qr_retraction(torch.randn(dim, rank)))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("spread", torch.ones(2 * rank))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def energies(self, x: Tensor) -> Tensor:
        """Return the energy shares e (N, 2R) of the tokens x (N, D); each row sums to 1 (up to epsilon = 1e-6)."""
        q = (self._sides(x) / self.spread.to(x.dtype)).square()
        return q / (q.sum(-1, keepdim=True) + _EPS)

    def forward(self, x: Tensor, *, context: Rows | None = None) -> Tensor:
        shares = self.energies(x)
        if self.sides is not None or 2 * self.rank > self.num_experts:
            shares = shares @ self.owners.to(x.dtype)
        return shares / self.temperature

    @property
    def owners(self) -> Tensor:
        """The expert of each side, one-hot: (2R, E); a row of zeros for a side without an expert."""
        if self.sides is None:
            sides = torch.arange(2 * self.rank, device=self.spread.device) % self.num_experts
            return F.one_hot(sides, self.num_experts).float()
        sides = torch.tensor(self.sides).to(self.spread.device, non_blocking=True)
        return F.one_hot(sides + 1, self.num_experts + 1)[:, 1:].float()

    def select(self, indices: Sequence[int] | Tensor) -> PrincipalScorer:
        """Return a scorer of these experts; they keep their logits.

        The sides of the experts that are gone have no expert any more, and go on taking their share of the energy.
        """
        chosen = chosen_experts("PrincipalScorer.select", indices, self.num_experts)
        sides = self.owners.argmax(1).where(self.owners.any(1), -1).tolist()
        scorer = self._cut(chosen, {})
        scorer.sides = [chosen.index(side) if side in chosen else -1 for side in sides]
        return scorer

    def flip_distance(
        self, x: Tensor, over: Tensor, under: Tensor, *, precision: torch.dtype = torch.float64
    ) -> Tensor:
        r"""Bound the distance from below by that of :math:`f_k = (\sum_{h \bmod E = k} q_h)^{1/2}`.

        f orders the experts as the logits do. The slope of :math:`f_i - f_j` in z is at most
        :math:`(M_i^{-2} + M_j^{-2})^{1/2}`, M_k the smallest m of expert k, because each coordinate of z moves only the
        side on which it lies.

        Rounding in ``precision`` moves z by at most :math:`\eta(\|x\| + \|\mu\|)`, and each f_k by a share of itself or
        by what underflows; both are taken off.
        """
        spread, owners, basis = self.spread.to(x.dtype), self.owners.to(x.dtype), full(self.basis).to(x.dtype)
        roots = ((self._sides(x) / spread).square() @ owners).sqrt()
        steepest = (owners / spread[:, None]).amax(0)
        relative = gamma(2 * self.rank + 12, precision)
        slope = (1 + relative) * (steepest[over].square() + steepest[under].square()).sqrt()
        one, two = roots.gather(1, over), roots.gather(1, under)
        least = (2 * self.rank * torch.finfo(precision).tiny) ** 0.5 * (1 + roots.norm(dim=-1, keepdim=True))
        gap = (1 - relative) * one - (1 + relative) * two - 2 * least
        noise = gamma(self.dim + 2, precision) * basis.norm()
        size = x.norm(dim=-1, keepdim=True) + self.mean.to(x.dtype).norm()
        radius: Tensor = (gap / slope - noise * size).clamp_min(0) / (sigma_max(basis) + noise)
        return radius

    def statistics(self, tokens: Tensor, counts: Tensor) -> Tensor | None:
        """Return sums over the tokens: of 1, x - mu, the sides and, before the first update, outer products."""
        if self.is_frozen:  # a frozen basis belongs to the mean and the sizes that it was trained with
            return None
        x = tokens.to(self.mean.dtype)
        sums = [self.mean.new_full((1,), len(x)), x.sum(0) - len(x) * self.mean, self._sides(x).sum(0)]
        if not int(self.updates):
            centred = x - self.mean
            sums.append((centred.T @ centred).flatten())
        return torch.cat(sums)

    def update(self, statistics: Tensor) -> None:
        sizes = [1, self.dim, 2 * self.rank]
        count, shift, spread, outer = statistics.split([*sizes, len(statistics) - sum(sizes)])
        usable = (count[0] != 0) & statistics.isfinite().all()
        taken, updates = torch.stack([usable.long(), self.updates]).tolist()  # at once: on a device the host waits
        if not taken:
            return
        shift, spread = shift / count, spread / count
        if len(outer):
            spread = self._start(outer.view(self.dim, self.dim) / count - torch.outer(shift, shift))
        self.updates += 1
        weight = max(1 / (updates + 1), self.momentum)
        self.mean += weight * shift
        self.spread.lerp_(spread, weight).clamp_min_(_EPS)

    def _start(self, covariance: Tensor) -> Tensor:
        """Let U be the leading eigenvectors; returns the mean of each side if the tokens were Gaussian."""
        values, vectors = torch.linalg.eigh(covariance)
        assign_(self.basis, vectors.flip(1)[:, : self.rank].contiguous())
        leading = values.flip(0)[: self.rank].clamp_min(_LEAST_VARIANCE * float(values[-1].clamp_min(0)))
        means: Tensor = (leading / (2 * torch.pi)).sqrt().repeat_interleave(2)
        return means

    def _sides(self, x: Tensor) -> Tensor:
        """max(z, 0) and max(-z, 0) (N, 2R)."""
        basis = full(self.basis).to(x.dtype)
        z = x @ basis - self.mean.to(x.dtype) @ basis
        return torch.stack([z, -z], -1).flatten(1).relu()

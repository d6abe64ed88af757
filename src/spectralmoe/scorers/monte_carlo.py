"""Uncertainty-aware routing: several passes of a scorer with dropout show how sure it is of each expert's score.

Zhang et al., "Efficient Deweather Mixture-of-Experts with Uncertainty-aware Feature-wise Linear Modulation" (MoFME),
arXiv 2312.16610, section on the uncertainty-aware router: mean and covariance of the weights over passes, whitened
deviations of norm 1. Written from the equations. Dropout as a posterior: Gal & Ghahramani, arXiv 1506.02142.
Differs: the whitened deviations have both signs, so they cannot weigh experts; they are logits here. Of the covariance
only the diagonal is used, because the covariance of M passes has at most rank M - 1. The default form is our own: it
lowers scores that vary much from pass to pass. A pass drops the same coordinates of all tokens of a step, as if each
pass were one draw of the scorer; so a token's score depends on no other token, and a recomputed forward repeats it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.context import Rows
from spectralmoe.errors import UserError, one_of
from spectralmoe.experts import Experts
from spectralmoe.scorers.base import Scorer
from spectralmoe.scrambling import chance, scrambled

__all__ = ["MonteCarlo"]

_FORMS = ("shrink", "whiten")
_EPS = 1e-12  # of a variance of scores: what is left of it is rounding


class MonteCarlo(Scorer):
    r"""Wraps a scorer and corrects its logits by M passes with dropout in training; evaluation is one plain pass.

    Pass m reads the token with a share p of its coordinates set to 0 and the others divided by 1 - p. It gives logits
    :math:`s^m` and scores :math:`r^m = \mathrm{softmax}(s^m)`. Let :math:`\mu` and v (N, E) be the mean and the
    variance of the scores over the passes, :math:`\bar v` the mean of v over the experts of a token, and r the scores
    of a pass without dropout.

    - ``"shrink"``: :math:`s = \log\mu - \log(1 + v/\bar v) + \overline{\log\textstyle\sum_e e^{s^m_e}}`. A score that
      varies more than the token's others counts less. The last term is the same for all experts; with it, s is the
      plain logits where the passes agree.
    - ``"whiten"``: :math:`s = z/\|z\|_2,\ z = (r - \mu)/\sqrt v`, the paper's equation with a diagonal covariance.
      These logits have norm 1 and those of evaluation do not, so the weights are even in training and sharp in
      evaluation.

    The dropped coordinates are drawn anew after each optimizer step (``after_step`` or ``attach``), from a seed that
    torch's random generator gives when the scorer is made. Seed and step are saved with the model.
    ``DistributedDataParallel`` gives all ranks the same seed; under FSDP2 call ``torch.manual_seed`` with the same
    number on all ranks. In evaluation the bounds and certificates of the wrapped scorer hold.

    Args:
        scorer: the scorer that is wrapped.
        passes: M >= 2, how many passes with dropout.
        dropout: p, in [0, 1). With 0 the logits are those of the wrapped scorer.
        form: "shrink" or "whiten".

    Raises:
        UserError: ``scorer`` is no scorer, there are fewer than two passes, dropout lies outside [0, 1), or ``form`` is
            unknown.

    >>> from spectralmoe import LinearScorer
    >>> scorer, x = MonteCarlo(LinearScorer(16, 4)), torch.randn(5, 16)
    >>> bool((scorer(x) == scorer(x)).all()), bool((scorer.eval()(x) == scorer.scorer(x)).all())
    (True, True)
    >>> mean, variance = scorer.moments(x)
    >>> torch.allclose(mean.sum(-1), torch.ones(5)), bool((variance > 0).all())
    (True, True)
    """

    seed: Tensor
    steps: Tensor

    def __init__(self, scorer: Scorer, *, passes: int = 5, dropout: float = 0.1, form: str = "shrink") -> None:
        if not isinstance(scorer, Scorer):
            raise UserError(
                f"MonteCarlo: wraps a scorer, got {type(scorer).__name__}; pass one, as in LinearScorer(D, E)"
            )
        super().__init__(scorer.dim, scorer.num_experts)
        if not isinstance(passes, int) or passes < 2:
            raise UserError(f"MonteCarlo: passes must be at least 2, so that they have a variance, got {passes}")
        if not 0 <= dropout < 1:
            raise UserError(f"MonteCarlo: dropout must lie in [0, 1), got {dropout}")
        if form not in _FORMS:
            raise one_of("form of MonteCarlo", form, _FORMS)
        self.scorer, self.passes, self.dropout, self.form = scorer, passes, dropout, form
        self.streams_tokens = scorer.streams_tokens
        self.register_buffer("seed", torch.randint(2**62, ()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, *, context: Rows | None = None) -> Tensor:
        if self._plain:
            return self.scorer(x, context=context)
        logits = self._logits(x, context)
        level = logits.logsumexp(-1, keepdim=True)
        log_scores = logits - level
        mean, variance = _moments(log_scores.exp())
        if self.form == "whiten":
            scores = self.scorer(x, context=context).softmax(-1)
            return F.normalize((scores - mean) / (variance + _EPS).sqrt(), dim=-1)
        spread = variance / (variance.mean(-1, keepdim=True) + _EPS)
        return log_scores.logsumexp(0) - math.log(self.passes) + level.mean(0) - spread.log1p()

    def moments(self, x: Tensor, *, context: Rows | None = None) -> tuple[Tensor, Tensor]:
        """Return the mean and the variance (N, E) of the scores over the passes, in training and in evaluation."""
        return _moments(self._logits(x, context).softmax(-1))

    def bind_experts(self, experts: Experts) -> None:
        self.scorer.bind_experts(experts)

    def select(self, indices: Sequence[int] | Tensor) -> Self:
        """Return a scorer of these experts alone, with the same dropout draws; in evaluation they keep their logits."""
        scorer = copy.deepcopy(self, {id(self.scorer): self.scorer.select(indices)})
        scorer.num_experts = scorer.scorer.num_experts
        return scorer

    @property
    def matrix(self) -> Tensor | None:
        return self.scorer.matrix

    def affine(self) -> tuple[Tensor, Tensor] | None:
        return self.scorer.affine() if self._plain else None

    def lipschitz(self) -> float | None:
        return self.scorer.lipschitz() if self._plain else None

    def rounding(self, x: Tensor, precision: torch.dtype) -> Tensor | None:
        return self.scorer.rounding(x, precision) if self._plain else None

    def flip_distance(
        self, x: Tensor, over: Tensor, under: Tensor, *, precision: torch.dtype = torch.float64
    ) -> Tensor | None:
        """Return the wrapped scorer's bound in evaluation; None in training."""
        return self.scorer.flip_distance(x, over, under, precision=precision) if self._plain else None

    def after_step(self) -> None:
        super().after_step()
        self.steps += 1

    @property
    def _plain(self) -> bool:
        """Whether its logits are those of the wrapped scorer."""
        return not self.training or self.dropout == 0

    def _logits(self, x: Tensor, context: Rows | None) -> Tensor:
        """The logits of all passes (M, N, E)."""
        places = torch.arange(self.passes * self.dim, device=self.seed.device).view(self.passes, -1)
        dropped = chance(scrambled(scrambled(self.seed + self.steps) + places), self.dropout)
        factors = (~dropped).to(x.dtype) / (1 - self.dropout)
        return torch.stack([self.scorer(x * factor, context=context) for factor in factors])


def _moments(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (N, E) of the scores (M, N, E) of all passes."""
    mean = scores.mean(0)
    return mean, (scores - mean).square().sum(0) / (len(scores) - 1)

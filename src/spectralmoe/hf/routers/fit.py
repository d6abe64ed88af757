"""Fits a scorer to logits that another router gave for the same tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.diagnostics.evaluation import evaluation_mode
from spectralmoe.errors import UserError
from spectralmoe.routing import apply_score
from spectralmoe.scorers import Scorer
from spectralmoe.selectors import Selector

__all__ = ["Agreement", "fit_scorer"]

_RATE = 0.05


class Agreement(NamedTuple):
    """The share of tokens for which two routers choose the same set of experts, before and after a fit."""

    before: float
    after: float


def fit_scorer(scorer: Scorer, tokens: Tensor, logits: Tensor, selector: Selector, *, steps: int = 300) -> Agreement:
    r"""Trains ``scorer`` until its scores are as near as they get to those of the given logits.

    With p the softmax (or sigmoids, as ``selector`` scores) of the logits t and s those of the scorer, it minimises the
    mean over tokens of :math:`\mathrm{KL}(p(t) \,\|\, p(s))`, all tokens at once: by LBFGS, or by Adam where bases go
    back to their manifold and statistics follow the tokens after each step, as in training. The scores change with
    the parameters alone, so the same call gives the same result.

    Args:
        scorer: is trained in place; parameters that take no gradient stay.
        tokens: (N, D), what the other router read.
        logits: (N, E), what it made of them.
        selector: of the scorer's router: the scores that count, and the choice that is compared.
        steps: of the optimizer, at most.

    Raises:
        UserError: no tokens, other shapes than the scorer's, logits that are not finite, a scorer without parameters to
            train or one that reads more than tokens.

    >>> from spectralmoe import LinearScorer, PrototypeScorer, TopK
    >>> _ = torch.manual_seed(0)
    >>> tokens, gate, scorer = torch.randn(500, 8), LinearScorer(8, 4), PrototypeScorer(8, 4)
    >>> fit_scorer(scorer, tokens, gate(tokens), TopK(2)).after > 0.95  # a prototype gate is a linear one
    True
    """
    _check(scorer, tokens, logits)
    device = next(scorer.parameters()).device
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    tokens, logits = tokens.detach().to(device, dtype), logits.detach().to(device, dtype)
    train = _by_adam if scorer.manifold or scorer.streams_tokens else _by_lbfgs
    with torch.autocast(device_type=device.type, enabled=False), evaluation_mode(selector):
        before = _agreement(scorer, tokens, logits, selector)
        with torch.enable_grad():
            train(_Fit(scorer, tokens, logits, selector), steps)
        scorer.zero_grad()
        return Agreement(before, _agreement(scorer, tokens, logits, selector))


class _Fit:
    """The distance of a scorer from the logits, and what is trained of it."""

    def __init__(self, scorer: Scorer, tokens: Tensor, logits: Tensor, selector: Selector) -> None:
        self.scorer, self.tokens, self.score = scorer, tokens, selector.score
        self.targets = apply_score(selector.score, logits)
        self.trained = [parameter for parameter in scorer.parameters() if parameter.requires_grad]

    def distance(self) -> Tensor:
        """KL divergence up to a constant of the logits."""
        logits = self.scorer(self.tokens)
        if self.score == "softmax":
            return F.cross_entropy(logits, self.targets)
        return F.binary_cross_entropy_with_logits(logits, self.targets)

    def gradient(self) -> Tensor:
        """Leaves the gradient in the parameters; returns the distance."""
        for parameter in self.trained:
            parameter.grad = None
        distance = self.distance()
        distance.backward()
        return distance


def _by_lbfgs(fit: _Fit, steps: int) -> None:
    optimizer = torch.optim.LBFGS(fit.trained, max_iter=steps, line_search_fn="strong_wolfe")
    optimizer.step(lambda: float(fit.gradient().detach()))
    fit.scorer.after_step()


def _by_adam(fit: _Fit, steps: int) -> None:
    optimizer = torch.optim.Adam(fit.trained, lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    counts = torch.zeros(fit.targets.shape[1], dtype=torch.int64, device=fit.tokens.device)
    for _ in range(steps):
        with torch.no_grad():
            if (statistics := fit.scorer.statistics(fit.tokens, counts)) is not None:
                fit.scorer.update(statistics)
        fit.gradient()
        optimizer.step()
        schedule.step()
        fit.scorer.after_step()


@torch.no_grad()
def _agreement(scorer: Scorer, tokens: Tensor, logits: Tensor, selector: Selector) -> float:
    ours, theirs = (_chosen(selector, values) for values in (scorer(tokens), logits))
    return float((ours == theirs).all(-1).double().mean())


def _chosen(selector: Selector, logits: Tensor) -> Tensor:
    """Which experts the selector gives each token: (N, E) bool."""
    indices, experts = selector.choose(logits), logits.shape[1]
    chosen = torch.zeros(len(logits), experts + 1, dtype=torch.bool, device=logits.device)
    return chosen.scatter(1, torch.where(indices < 0, experts, indices), True)[:, :experts]


def _check(scorer: Scorer, tokens: Tensor, logits: Tensor) -> None:
    name = type(scorer).__name__
    if scorer.reads:
        raise UserError(
            f"{name} reads {scorer.reads[0]!r} beside the token, which a gate's logits do not depend on; start it fresh"
        )
    if not any(parameter.requires_grad for parameter in scorer.parameters()):
        raise UserError(f"{name} has no parameters that can be fitted; unfreeze it, or take another scorer")
    if tokens.dim() != 2 or not len(tokens) or tokens.shape[1] != scorer.dim:
        raise UserError(f"fit: tokens must be (N, {scorer.dim}) with N > 0, got shape {list(tokens.shape)}")
    if logits.shape != (len(tokens), scorer.num_experts):
        raise UserError(
            f"fit: logits must be ({len(tokens)}, {scorer.num_experts}), one row a token, got {list(logits.shape)}"
        )
    if not bool(logits.isfinite().all()):
        raise UserError("fit: the logits hold values that are not finite; fit on tokens that the model can read")

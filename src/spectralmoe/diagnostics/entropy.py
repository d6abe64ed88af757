"""Entropies of the scores: of single tokens, and of the mean over all tokens.

Both are divided by log E, so that layers of any size compare: 1 is even, 0 is one expert. They are the "local" and
"global" entropy of Mustafa et al., "LIMoE", arXiv 2206.02770, there without the division. Their difference is the
mutual information of token and expert, over log E; near 0, the choice does not depend on the token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectralmoe.diagnostics.measure import Measure
from spectralmoe.routing import Routing

__all__ = ["are_probabilities", "mean_entropy", "token_entropies", "token_entropy"]


def token_entropy(routing: Routing) -> Measure:
    r"""Compute the mean over the real tokens of :math:`H(p_t)/\log E`, p the scores normalised to sum 1.

    With one expert there is no data.

    >>> from spectralmoe import LinearScorer, Router, TopK
    >>> router = Router(LinearScorer(8, 4), TopK(2))
    >>> _ = router.scorer.weight.data.zero_()
    >>> str(token_entropy(router(torch.randn(64, 8))))
    '1 (64 tokens)'
    """
    entropies = token_entropies(routing)[_known(routing)]
    return Measure.of(entropies.mean(), len(entropies))


def mean_entropy(routing: Routing) -> Measure:
    r"""Compute :math:`H(\bar p)/\log E`, with :math:`\bar p` the mean over the real tokens of the normalised scores.

    It is never below ``token_entropy``. With one expert there is no data.

    >>> from spectralmoe.routing import Routing
    >>> logits = torch.tensor([[50.0, -50.0], [-50.0, 50.0]])
    >>> routing = Routing(logits, torch.ones(2, 1), torch.tensor([[0], [1]]), logits.softmax(-1))
    >>> token_entropy(routing).value, mean_entropy(routing).value
    (0.0, 1.0)
    """
    probs = _probs(routing)[_known(routing)]
    return Measure.of(_normalised(probs.mean(0)), len(probs))


def token_entropies(routing: Routing) -> Tensor:
    """Compute the entropy over log E of each token's normalised scores: (N,) float64; nan for one expert.

    Ignore the 0 of padding, and of a token whose scores are all 0.
    """
    return _normalised(_probs(routing))


def are_probabilities(logits: Tensor) -> bool:
    """Return whether every row is a distribution: no entry is below 0, and the sum is 1 up to rounding.

    >>> are_probabilities(torch.eye(3)), are_probabilities(torch.ones(2, 3))
    (True, False)
    """
    close = 2 * torch.finfo(logits.dtype).eps + 1e-5
    return bool(logits.numel() and (logits >= 0).all() and ((logits.double().sum(-1) - 1).abs() <= close).all())


def _probs(routing: Routing) -> Tensor:
    """Scores in float64, those below 0 (a sigmoid plus a selection bias) as 0, normalised."""
    scores = routing.scores.detach().double().clamp_min(0)
    total = scores.sum(-1, keepdim=True)
    return scores / torch.where(total == 0, 1, total)


def _known(routing: Routing) -> Tensor:
    """Which tokens are real and have any score (N,)."""
    scores = routing.scores.detach()
    scored = (scores > 0).any(-1) | scores.isnan().any(-1)
    return scored if routing.mask is None else scored & routing.mask


def _normalised(probs: Tensor) -> Tensor:
    e = probs.shape[-1]
    return -torch.xlogy(probs, probs).sum(-1) / (math.log(e) if e > 1 else math.nan)

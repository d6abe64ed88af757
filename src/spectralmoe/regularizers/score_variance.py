"""Variance of the scores: a term that rewards experts whom some tokens want and others do not.

Guo et al., "Advancing Expert Specialization for Better MoE", arXiv 2505.22323, the variance loss L_v. Authors' code:
https://github.com/HongcanGuo/Auxloss-For-Advancing-Expert-Specialization (MIT).
Differs: the mean over tokens instead of the sum.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spectralmoe.errors import one_of
from spectralmoe.routing import Routing
from spectralmoe.tape import Record

__all__ = ["score_variance"]


def score_variance(record: Record | Routing, *, over: Literal["tokens", "experts"] = "tokens") -> Tensor:
    r"""Minus the variance of the scores s (N, E): normalised over all experts, and 0 for those that were not chosen.

    "tokens" (the paper's): :math:`-\frac1N \sum_t \frac1E \sum_j (s_{tj} - \bar s_j)^2`, with :math:`\bar s_j` the mean
    over the tokens: 0 where all tokens are routed alike, however sharply. "experts" (the authors' code): the same with
    the mean :math:`\bar s_t` over the experts of each token, a reward for sharp scores that opposes ``router_z``.

    Only real tokens count; 0 without one. Where a choice changes, a score jumps between 0 and its value: the gradient
    is that of the chosen scores. Of a replayed routing it is the choice that the router itself makes.

    Raises:
        UserError: an unknown ``over``.

    >>> from spectralmoe import LinearScorer, Router, TopK
    >>> router = Router(LinearScorer(8, 4), TopK(1))
    >>> routing = router(torch.ones(64, 8))  # the same token 64 times
    >>> abs(round(score_variance(routing).item(), 4)), score_variance(routing, over="experts").item() < 0
    (0.0, True)
    """
    routing = (record if isinstance(record, Routing) else record.routing).unforced
    scores = torch.where(routing.members(), routing.probs, 0)
    if over == "tokens":
        mean = routing.real(scores)
    elif over == "experts":
        mean = scores.mean(1, keepdim=True)
    else:
        raise one_of("over of score_variance", over, ["experts", "tokens"])
    return -routing.real((scores - mean).square()).mean()

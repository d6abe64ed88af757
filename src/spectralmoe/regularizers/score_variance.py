"""Score variance: a term that rewards experts which score high for some tokens and low for others.

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
    r"""Compute minus the variance of the scores s (N, E) of the chosen experts.

    s are the scores normalised to sum 1 over all experts, and then set to 0 for experts that were not chosen.

    - "tokens" (the paper's): :math:`-\frac1N \sum_t \frac1E \sum_j (s_{tj} - \bar s_j)^2` with :math:`\bar s_j` the
      mean over the tokens. It is 0 if all tokens are routed alike, however sharply.
    - "experts" (the authors' code): the same with :math:`\bar s_t`, the mean over the experts of a token. It rewards
      sharp scores, against ``router_z``.

    Only real tokens count; without one the value is 0. The gradient is that of the chosen experts' scores. If the
    choice was replayed, the router's own choice is taken.

    Args:
        over: over what the mean is taken, "tokens" or "experts".

    Raises:
        UserError: ``over`` is unknown.

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

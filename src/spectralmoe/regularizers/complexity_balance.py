"""Complexity balance: a term that gives experts importance in inverse proportion to what they cost.

Zamfir et al., "Complexity Experts are Task-Discriminative Learners for Any Image Restoration" (MoCE-IR), arXiv
2411.18466, the routing loss, after Shazeer et al., arXiv 1701.06538, and Riquelme et al., arXiv 2106.05974.
Differs: the costs are operations (``experts.costs()``) or given, instead of numbers of parameters. The load compares an
expert with the K-th of the others without their noise, because a record does not hold the noise. Means over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectralmoe.regularizers.balance import squared_variation
from spectralmoe.regularizers.costs import cost_shares
from spectralmoe.routing import Routing
from spectralmoe.tape import Record

__all__ = ["complexity_balance"]


def complexity_balance(
    record: Record | Routing, costs: Sequence[float] | Tensor | None = None, *, load: bool = True
) -> Tensor:
    r"""Penalise importance that is not inverse to cost: :math:`\frac12 [\mathrm{CV}^2(I_e b_e) + \mathrm{CV}^2(L_e)]`.

    CV is the coefficient of variation over the experts. I (E,) is the mean over the real tokens of the scores
    normalised to sum 1, and b = costs / max(costs). L (E,) is the mean probability that an expert is among the K chosen
    if its logit gets noise of standard deviation 1/E, as in ``NoisyTopK``: :math:`L_e = \mathrm{mean}_t\,
    \Phi(E (s_{te} - \tau_{te}))` with :math:`\tau_{te}` the K-th largest logit of the other experts. If every token
    uses all experts, L is 1 and its part 0.

    The first part is 0 where importance is proportional to 1/b. So it is a fixed target for the load, not a preference
    for cheap experts where they suffice. The second part asks for an even load, which is another target. The authors
    give the term the weight 0.01. It needs many more routed tokens (or samples) than experts.

    Args:
        costs: one cost for each expert, in any unit; None takes ``experts.costs()`` of the layer, operations a
            position.
        load: whether the second part is added; without it the value is :math:`\mathrm{CV}^2(I_e b_e)`.

    Raises:
        UserError: costs are not one positive number for each expert, or are missing for a ``Routing`` without a layer.

    >>> from spectralmoe import LinearScorer, Router, TopK
    >>> router = Router(LinearScorer(1, 2), TopK(1))
    >>> _ = router.scorer.weight.data.copy_(torch.tensor([[2.0], [1.0]]).log())
    >>> routing = router(torch.ones(5, 1))  # scores 2/3 and 1/3
    >>> round(complexity_balance(routing, [1.0, 2.0], load=False).item(), 6)
    0.0
    """
    routing = record if isinstance(record, Routing) else record.routing
    importance = routing.real(routing.probs)
    balance = squared_variation(importance * cost_shares("complexity_balance", record, costs, importance))
    return (balance + squared_variation(_clear(routing))) / 2 if load else balance


def _clear(routing: Routing) -> Tensor:
    """The mean probability over the real tokens that each expert is among the K chosen: (E,)."""
    logits, k = routing.logits, routing.indices.shape[1]
    if k >= routing.num_experts:
        return logits.new_ones(routing.num_experts)
    ranked = logits.topk(k + 1, -1).values
    last, next_one = ranked[:, k - 1 : k], ranked[:, k:]
    others = torch.where(logits >= last, next_one, last)  # the K-th largest without the expert itself
    return routing.real(torch.special.ndtr(routing.num_experts * (logits - others)))

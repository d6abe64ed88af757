"""Complexity balance: a term that gives experts importance in inverse proportion to what they cost.

Zamfir et al., "Complexity Experts are Task-Discriminative Learners for Any Image Restoration" (MoCE-IR), arXiv
2411.18466, the routing loss, after Shazeer et al., arXiv 1701.06538, and Riquelme et al., arXiv 2106.05974.
Differs: the costs are those that the bank says, or given, instead of numbers of parameters; the load asks whether an
expert would come before the K-th of the others without their noise, which no record holds; the mean over tokens.
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
    r""":math:`\frac{1}{2} [\mathrm{CV}^2(I_e b_e) + \mathrm{CV}^2(L_e)]`; the first square alone without ``load``.

    I (E,) is the mean over real tokens of the normalised scores, b = costs / max(costs), and L the mean probability
    that an expert is among the K chosen when its logit gets noise of standard deviation 1/E (``NoisyTopK``):
    :math:`L_e = \mathrm{mean}_t\, \Phi(E (s_{te} - \tau_{te}))`, with the K-th largest logit of the others as
    :math:`\tau_{te}`. Where every token uses all experts, L is 1 and its square 0.

    The first square is 0 where importance is proportional to 1/b, whatever the tokens are: it is a fixed target for the
    load, not a preference for what is cheap enough. The second one asks for an even load, which pulls against it.
    The authors weigh the term by 0.01. It needs many more tokens (samples, where samples are routed) than experts.

    Args:
        costs: of each expert, any unit; None: what the layer's bank says of one position, ``experts.costs()``.

    Raises:
        UserError: costs that are not one positive number an expert; none given with a ``Routing`` alone.

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
    """How likely each expert is among the K chosen (E,), mean over real tokens."""
    logits, k = routing.logits, routing.indices.shape[1]
    if k >= routing.num_experts:
        return logits.new_ones(routing.num_experts)
    ranked = logits.topk(k + 1, -1).values
    last, next_one = ranked[:, k - 1 : k], ranked[:, k:]
    others = torch.where(logits >= last, next_one, last)  # the K-th largest without the expert itself
    return routing.real(torch.special.ndtr(routing.num_experts * (logits - others)))

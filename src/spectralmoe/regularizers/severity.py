"""Severity balance: a balance loss that sends the tokens of a less degraded sample to experts that do nothing.

"MoR", arXiv 2511.16024, its load-balancing loss.
Differs: if a sample has several severities, their mean counts. A severity below ``floor`` counts as ``floor``; near 0
all tokens would go to the zero experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.routing import Routing
from spectralmoe.tape import Record

__all__ = ["severity_balance"]


def severity_balance(
    record: Record | Routing, severity: Tensor | float | str, *, num_real: int, floor: float = 0.05
) -> Tensor:
    r"""Compute a balance loss with a price for each expert: :math:`E \sum_i f_i\,\mathrm{mean}_t(\alpha_{ti} p_{ti})`.

    The price :math:`\alpha_{ti}` is 1 for the first ``num_real`` experts. For the others, which are zero experts and
    add nothing to the output, it is the severity s of the token's sample. f (E,) is ``routing.load()``, and p (N, E)
    are the scores of the real tokens, normalised to sum 1. If all samples have the same s, the loss is smallest where
    the load of expert i is proportional to :math:`1/\alpha_i`, so that n real and Z zero experts share it as n to Z /
    s. With s = 1 it is ``load_balance``. The paper gives no weight for it; 0.01 is usual for balance losses.

    Args:
        severity: how badly a sample is degraded, in [0, 1], 1 for the worst. One number for all; one for each token
            (N,) or each sample (B,); several for each, (N, P) or (B, P), whose mean counts; or the name under which the
            layer got it as side information.
        num_real: how many experts are no zero experts; these come first.
        floor: the smallest severity; smaller ones count as this.

    Raises:
        UserError: ``num_real`` is not 1 to E, the floor is not positive, the severity has another number of rows, or
            the record has no side information of that name.

    >>> from spectralmoe import LinearScorer, Router, TopK
    >>> router = Router(LinearScorer(1, 6), TopK(2))
    >>> _ = router.scorer.weight.data.copy_(torch.tensor([[1.0], [1.0], [1.0], [1.0], [2.0], [2.0]]).log())
    >>> routing = router(torch.ones(5, 1))  # scores 1/8 and 2/8, both slots go to the last two
    >>> [round(severity_balance(routing, s, num_real=4).item(), 3) for s in (1.0, 0.5)]
    [1.5, 0.75]
    """
    routing = (record if isinstance(record, Routing) else record.routing).unforced
    if not 1 <= num_real <= routing.num_experts:
        raise UserError(f"severity_balance: num_real must be 1 to E={routing.num_experts}, got {num_real}")
    if not floor > 0:
        raise UserError(f"severity_balance: floor must be positive, got {floor}")
    value = _named(record, severity) if isinstance(severity, str) else severity
    s = _by_token(value, routing).clamp_min(floor)
    alpha = torch.where(torch.arange(routing.num_experts, device=s.device) < num_real, 1, s[:, None])
    return routing.num_experts * (routing.load() * routing.real(alpha * routing.probs)).sum()


def _named(record: Record | Routing, name: str) -> Tensor:
    """The side information ``name`` that the layer of a record got."""
    side = None if isinstance(record, Routing) else record.context
    if side is None or name not in side:
        there = ", ".join(side or {}) or "nothing"
        raise UserError(
            f"severity_balance: the record holds {there} of the context, not {name!r}; pass it to the layer with "
            "Context(samples=...)"
        )
    return side[name]


def _by_token(severity: Tensor | float, routing: Routing) -> Tensor:
    """The mean severity of each token's sample: (N,), without gradient; 0 for padding."""
    tokens, shape = len(routing.logits), routing.shape or (len(routing.logits),)
    given = (
        severity.detach().to(routing.logits) if isinstance(severity, Tensor) else routing.logits.new_full((), severity)
    )
    mean = given if given.dim() < 2 else given.flatten(1).mean(1)
    if mean.dim() == 0:
        return mean.expand(tokens)
    if len(mean) not in (tokens, shape[0]):
        raise UserError(
            f"severity_balance: severity of shape {tuple(given.shape)} has no row for each of {tokens} tokens, nor for "
            f"each of {shape[0]} samples"
        )
    each = mean if len(mean) == tokens else mean.repeat_interleave(tokens // shape[0])
    return each if routing.mask is None else each.masked_fill(~routing.mask, 0)

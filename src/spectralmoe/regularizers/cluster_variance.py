"""Cluster variance: a term that makes the mean scores of a group's experts alike, so that each may replace another.

Xie et al., "MoEC: Mixture of Expert Clusters", arXiv 2207.09094, section 3. Written from the equations.
Differs: the mean over tokens instead of the sum, so that it does not grow with the batch; the population variance.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spectralmoe.errors import UserError, one_of
from spectralmoe.routing import Routing
from spectralmoe.selectors import ClusterDropout
from spectralmoe.tape import Record

__all__ = ["cluster_variance"]

_FORMS = (0, 1, 2)


def cluster_variance(record: Record | Routing, *, groups: int, form: Literal[0, 1, 2] = 1) -> Tensor:
    r"""Compute the variance of the experts' mean scores P within G groups of consecutive experts.

    P (E,) is the mean over the real tokens of the scores normalised to sum 1. The population variance is

    - form 0: :math:`\mathrm{Var}(P)` over all experts, whatever ``groups`` is;
    - form 1: :math:`V = \frac{1}{G} \sum_g \mathrm{Var}(P_i, i \in g)`;
    - form 2: :math:`V / \exp(m_1 - m_2)`, where m_1 and m_2 are the two largest means of P within a group.

    Experts that ``ClusterDropout`` leaves out do not count; this needs a ``Record``, since a ``Routing`` does not say
    which they are. Without a real token the value is 0.

    The paper's loss is ``load_balance`` with the weight 0.01 plus this term with the weight :math:`0.01\, E\, \rho`. V
    is of the size :math:`E^{-2}`, so a useful :math:`\rho` is about 10 to 100. The term is small, too, if all scores go
    to few groups: use it together with ``load_balance``.

    Args:
        groups: G, which divides E.
        form: 0, 1 or 2.

    Raises:
        UserError: groups do not divide E or hold one expert each, whose variance is always 0; the form is unknown; or
            form is 2 with one group.

    >>> from spectralmoe import LinearScorer, Router, TopK
    >>> router = Router(LinearScorer(1, 4), TopK(1))
    >>> _ = router.scorer.weight.data.copy_(torch.tensor([[4.0], [2.0], [1.0], [1.0]]).log())
    >>> routing = router(torch.ones(5, 1))  # scores 4/8, 2/8 and 1/8, 1/8
    >>> [round(cluster_variance(routing, groups=2, form=form).item() * 64, 3) for form in (0, 1, 2)]
    [1.5, 0.5, 0.389]
    """
    routing = record if isinstance(record, Routing) else record.routing
    experts = routing.num_experts
    if form not in _FORMS:
        raise one_of("form of cluster_variance", str(form), _FORMS)
    if not isinstance(groups, int) or groups < 1 or experts % groups:
        raise UserError(f"cluster_variance: groups={groups} is no whole number that divides E={experts} experts")
    if form and groups == experts:
        raise UserError(f"cluster_variance: groups={groups} of E={experts} experts hold one each, of no variance")
    if form == 2 and groups == 1:
        raise UserError("cluster_variance: form=2 compares two groups, but groups=1; use form=1")
    means = routing.real(routing.probs).view(groups if form else 1, -1)
    part = _taking_part(record, means)
    number = part.sum(-1, keepdim=True).clamp_min(1)
    centres = (means * part).sum(-1, keepdim=True) / number
    variance = (((means - centres) * part).square().sum(-1, keepdim=True) / number).mean()
    if form < 2:
        return variance
    largest = centres.flatten().topk(2).values
    return variance * (largest[1] - largest[0]).exp()


def _taking_part(record: Record | Routing, means: Tensor) -> Tensor:
    """1 for each expert that takes part, 0 for those that are left out in training; shaped as ``means``."""
    if isinstance(record, Record) and record.training and record.router is not None:
        for part in record.router.selector.modules():
            if isinstance(part, ClusterDropout):
                return part.taking_part.view_as(means).to(means.dtype)
    return torch.ones_like(means)

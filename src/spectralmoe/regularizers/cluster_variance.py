"""Cluster variance: a term that evens out what the experts of a group are given, so that one may stand in for another.

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
    r"""Variance of the experts' mean scores P within G groups of consecutive experts: 0 where siblings get the same.

    P (E,) is the mean over real tokens of the normalised scores. Form 0: :math:`\mathrm{Var}(P)` over all experts,
    whatever ``groups`` is. Form 1: :math:`V = \frac{1}{G} \sum_g \mathrm{Var}(P_i, i \in g)`. Form 2: :math:`V /
    \exp(m_1 - m_2)`, with the two largest of the groups' means of P. Experts that ``ClusterDropout`` leaves out have no
    part in it, where a record says who they are; a ``Routing`` alone does not. Without a real token it is 0.

    The paper's loss is ``load_balance`` with the weight 0.01 and this term with :math:`0.01\, E\, \rho`. V is of the
    size :math:`E^{-2}`, so :math:`\rho` is about 10 to 100 here.

    It makes the siblings' mean scores alike, not their tokens, and where all scores go to few groups it may be small
    too: keep ``load_balance`` beside it.

    Raises:
        UserError: groups that do not divide E, or of one expert each (their variance is always 0); an unknown form;
            form 2 with one group.

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

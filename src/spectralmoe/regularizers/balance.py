"""Terms on the routing distribution: load balance, size of the logits, spread of importance."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmoe.routing import Routing
from spectralmoe.tape import Record

__all__ = ["importance_cv2", "load_balance", "router_z", "squared_variation"]


def load_balance(record: Record | Routing) -> Tensor:
    r"""Compute the Switch load-balancing loss :math:`E \sum_i f_i P_i`, which is 1.0 for a perfectly even load.

    f (E,) is ``routing.load()``, each expert's share of the filled slots, without gradient. P (E,) is the mean over the
    real tokens of the scores normalised to sum 1. Without a real token the loss is 0. If the choice was replayed, f is
    the load that the router's own choice would have: a replayed f never changes and would push the scores away from
    itself without end. Fedus et al., "Switch Transformers", arXiv 2101.03961, equation 4, here for any k.

    >>> from spectralmoe import LinearScorer, Router, TopK
    >>> router = Router(LinearScorer(8, 4), TopK(2))
    >>> _ = router.scorer.weight.data.zero_()
    >>> round(load_balance(router(torch.randn(64, 8))).item(), 4)
    1.0
    """
    routing = _routing(record).unforced
    return routing.num_experts * (routing.load() * routing.real(routing.probs)).sum()


def router_z(record: Record | Routing) -> Tensor:
    r"""Compute the router z-loss, the mean over real tokens of :math:`(\log \sum_i e^{s_i})^2`, to keep logits small.

    Zoph et al., "ST-MoE", arXiv 2202.08906, equation 5.

    >>> from spectralmoe import LinearScorer, Router, TopK
    >>> router = Router(LinearScorer(8, 4), TopK(2))
    >>> _ = router.scorer.weight.data.zero_()
    >>> round(router_z(router(torch.randn(64, 8))).item(), 4)  # log(4)^2
    1.9218
    """
    routing = _routing(record)
    return routing.real(torch.logsumexp(routing.logits, -1).square())


def importance_cv2(record: Record | Routing) -> Tensor:
    r"""Compute the squared coefficient of variation of the experts' importance :math:`I_i = \sum_t p_{ti}`.

    p are the scores normalised to sum 1, t the real tokens. The value is :math:`\mathrm{Var}(I) / \mathrm{mean}(I)^2`
    with the population variance: 0 if all experts have the same importance, and without a real token. Shazeer et al.,
    arXiv 1701.06538, equation 7.

    >>> from spectralmoe import LinearScorer, Router, TopK
    >>> router = Router(LinearScorer(1, 2), TopK(1))
    >>> _ = router.scorer.weight.data.copy_(torch.tensor([[3.0], [1.0]]).log())
    >>> round(importance_cv2(router(torch.ones(5, 1))).item(), 4)  # scores 3/4 and 1/4
    0.25
    """
    routing = _routing(record)
    return squared_variation(routing.real(routing.probs))


def squared_variation(values: Tensor) -> Tensor:
    """Return the population variance of ``values`` (E,) over their squared mean; 0 if all are 0."""
    mean = values.mean()
    spread = (values - mean).square().mean()
    return spread / mean.square().clamp_min(torch.finfo(mean.dtype).tiny)


def _routing(record: Record | Routing) -> Routing:
    return record if isinstance(record, Routing) else record.routing

"""Terms on the routing distribution: load balance, size of the logits, spread of importance."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmoe.routing import Routing
from spectralmoe.tape import Record

__all__ = ["importance_cv2", "load_balance", "router_z", "squared_variation"]


def load_balance(record: Record | Routing) -> Tensor:
    r"""Switch load-balancing loss :math:`E \sum_i f_i P_i`: 1.0 for a perfectly even load.

    f (E,) is ``routing.load()`` (share of filled slots, without gradient), P (E,) the mean over real tokens of the
    normalised scores. One value a layer; 0 without a real token. Of a replayed routing, f is the load of the choice
    that the router itself makes: a fixed f would push the scores away from it without end. Fedus et al., "Switch
    Transformers", arXiv 2101.03961, equation 4, for any k.

    >>> from spectralmoe import LinearScorer, Router, TopK
    >>> router = Router(LinearScorer(8, 4), TopK(2))
    >>> _ = router.scorer.weight.data.zero_()
    >>> round(load_balance(router(torch.randn(64, 8))).item(), 4)
    1.0
    """
    routing = _routing(record).unforced
    return routing.num_experts * (routing.load() * routing.real(routing.probs)).sum()


def router_z(record: Record | Routing) -> Tensor:
    r"""Router z-loss: mean over real tokens of :math:`(\log \sum_i e^{s_i})^2`, which keeps logits small.

    Zoph et al., "ST-MoE", arXiv 2202.08906, equation 5.
    """
    routing = _routing(record)
    return routing.real(torch.logsumexp(routing.logits, -1).square())


def importance_cv2(record: Record | Routing) -> Tensor:
    r"""Squared coefficient of variation of the experts' importance :math:`I_i = \sum_t p_{ti}` over real tokens.

    :math:`\mathrm{Var}(I) / \mathrm{mean}(I)^2` with the population variance; 0 when all experts weigh the same, and
    without a real token. Shazeer et al., arXiv 1701.06538, equation 7.
    """
    routing = _routing(record)
    return squared_variation(routing.real(routing.probs))


def squared_variation(values: Tensor) -> Tensor:
    """The squared coefficient of variation of ``values`` (E,): population variance over squared mean; 0 of zeros."""
    mean = values.mean()
    spread = (values - mean).square().mean()
    return spread / mean.square().clamp_min(torch.finfo(mean.dtype).tiny)


def _routing(record: Record | Routing) -> Routing:
    return record if isinstance(record, Routing) else record.routing

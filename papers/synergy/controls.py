"""A control of the card: a term that sharpens routing and knows nothing of layers."""

from __future__ import annotations

import math

from torch import Tensor

from spectralmoe.tape import Record

__all__ = ["routing_entropy"]


def routing_entropy(record: Record) -> Tensor:
    r"""Mean over real tokens of :math:`H(p_t)/\log E`: the entropy of the scores, from 0 (sure) to 1 (even).

    >>> from spectralmoe import LinearScorer, FeedForward, MoE, Router, TopK, record
    >>> layer = MoE(Router(LinearScorer(4, 3), TopK(1)), FeedForward(3, 4, 8))
    >>> _ = layer.router.scorer.weight.data.zero_()
    >>> with record(layer) as tape:
    ...     y = layer(torch.randn(5, 4))
    >>> round(float(routing_entropy(tape[0])), 4)
    1.0
    """
    logits = record.routing.logits.log_softmax(-1)
    return record.routing.real(-(logits.exp() * logits).sum(-1)) / math.log(logits.shape[-1])

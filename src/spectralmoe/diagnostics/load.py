"""Load metrics: functions of one layer's load (E,), each expert's share of the slots.

They take ``Routing.load()`` of one batch, a load computed from added ``load_counts`` of several, or one of single
sequences (``per_sequence``). For a load of zeros (no token was seen) they return nan, and count all experts as dead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.moe import MoE
from spectralmoe.routing import Routing, count_slots
from spectralmoe.tape import Record

__all__ = [
    "DEAD_SHARE",
    "concentration",
    "dead_experts",
    "gini",
    "load_imbalance",
    "max_share",
    "max_vio",
    "min_share",
    "per_sequence",
]

DEAD_SHARE = 0.1
"""An expert is dead if it has less than this share of an even load."""


def max_vio(load: Tensor) -> float:
    """Compute MaxVio, the largest load over the mean load, minus 1 (arXiv 2408.15664).

    It is 0 for an even load, and E/K - 1 if top-K routing has collapsed onto K experts.

    >>> max_vio(torch.tensor([0.5, 0.25, 0.25, 0.0]))
    1.0
    """
    return float(load.max() / load.mean() - 1) if load.sum() else float("nan")


def load_imbalance(record: Record, *, physical: bool = False) -> float:
    r"""Compute the load imbalance score (LIS) of one call of a layer, which is MaxVio + 1.

    .. math:: \mathrm{LIS} = \frac{E \max_j n_j}{\sum_j n_j}

    n_j is the number of slots of expert j. The score is 1 for an even load and E/K for a collapse onto K experts. Zero
    experts and their slots do not count. For several calls take the mean, because their summed load hides how uneven
    single batches are. R&Q, arXiv 2602.19938, where :math:`\sum_j n_j = N K`.

    Args:
        physical: whether places of the bank are counted instead of experts of the router, so that the replicas of an
            expert share its load.

    Returns:
        The score; nan if no slot is filled.

    Raises:
        UserError: routing is soft, so every expert serves every token.

    >>> from spectralmoe import FeedForward, LinearScorer, Placement, Router, TopK, record
    >>> router = Router(LinearScorer(4, 2), TopK(1))
    >>> router.scorer.weight.data[1] = -router.scorer.weight.data[0]
    >>> layer = MoE(router, FeedForward(3, 4, 8), placement=Placement([[0, 2], [1]]))
    >>> with record(layer) as tape:
    ...     y = layer(torch.sign(router.scorer.weight.data[:1]).expand(9, 4))
    >>> load_imbalance(tape[0]), round(load_imbalance(tape[0], physical=True), 2)
    (2.0, 1.67)
    """
    routing, layer = record.routing, record.layer
    if routing.soft:
        raise UserError(
            f"load_imbalance: every token of layer {record.name!r} uses every expert, so none is busier; use TopK(k)"
        )
    placement, counts = getattr(layer, "placement", None), routing.counts()
    if physical and placement is not None:
        counts = count_slots(placement(routing).indices, placement.num_places)
    elif isinstance(layer, MoE):
        counts = counts[[e for e in range(routing.num_experts) if layer.places(e)]]
    return 1 + max_vio(counts.double())


def gini(load: Tensor) -> float:
    """Compute the Gini coefficient of the load: 0 is even, 1 - K/E is a collapse of top-K routing onto K experts.

    >>> gini(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    0.75
    """
    e = load.numel()
    rank = torch.arange(1, e + 1, dtype=load.dtype, device=load.device)
    ordered = load.sort().values
    return float(2 * (rank * ordered).sum() / (e * ordered.sum()) - (e + 1) / e) if load.sum() else float("nan")


def dead_experts(load: Tensor) -> int:
    """Count the experts that have less than ``DEAD_SHARE`` of an even load.

    >>> dead_experts(torch.tensor([0.5, 0.49, 0.01, 0.0]))
    2
    """
    return int((load < DEAD_SHARE / load.numel()).sum())


def min_share(load: Tensor) -> float:
    """Return the smallest share of the load that an expert has; 1/E is even."""
    return float(load.min()) if load.sum() else float("nan")


def max_share(load: Tensor) -> float:
    """Return the largest share of the load that an expert has: 1/E is even, 1/K is a collapse of top-K routing."""
    return float(load.max()) if load.sum() else float("nan")


def concentration(load: Tensor, k: int) -> float:
    r"""Measure how far the load is concentrated on the K busiest experts: 0 is even, 1 is a collapse onto K experts.

    .. math::
        \frac{\sum_{i \le K} f_{(i)} - K/E}{1 - K/E}, \qquad f_{(1)} \ge f_{(2)} \ge \dots

    Args:
        k: experts a token. Top-K routing cannot collapse onto fewer than K experts, as each serves a token once.

    Returns:
        The concentration; nan for a load of zeros, for k >= E and for k < 1.

    >>> concentration(torch.tensor([0.5, 0.5, 0.0, 0.0]), 2), concentration(torch.full((4,), 0.25), 2)
    (1.0, 0.0)
    """
    e = load.numel()
    if not 1 <= k < e or not load.sum():
        return float("nan")
    return float((load.topk(k).values.sum() / load.sum() - k / e) / (1 - k / e))


def per_sequence(routing: Routing) -> Tensor:
    """Return ``Routing.load_counts`` of each sequence by itself: (B, E) int64; (0, E) if there are no sequences.

    B is the first of the tokens' leading dimensions (B, ...). ``max_vio`` of a row is the MaxVio of one sequence, which
    may be uneven even if the whole batch is even.

    >>> indices = torch.tensor([[0], [0], [1], [0]])
    >>> logits = torch.zeros(4, 2)
    >>> per_sequence(Routing(logits, torch.ones(4, 1), indices, logits, shape=(2, 2))).tolist()
    [[2, 0], [1, 1]]
    """
    e, shape = routing.num_experts, routing.shape or ()
    sequences = shape[0] if len(shape) > 1 else 0
    slots = routing.top_expert()[:, None] if routing.soft else routing.indices
    if not sequences * slots.numel():
        return torch.zeros(sequences, e, dtype=torch.int64, device=slots.device)
    owner = torch.arange(sequences, device=slots.device).repeat_interleave(len(slots) // sequences)[:, None]
    inside = (slots >= 0) & (slots < e)
    return count_slots(torch.where(inside, owner * e + slots, -1), sequences * e).reshape(sequences, e)

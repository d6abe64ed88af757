"""Expected cost: a term that prefers cheap experts where they suffice.

After "PhyG-MoE", arXiv 2601.12798, abstract: a large expert on demand, light experts otherwise. The abstract does not
say how the authors limit the compute; this is the expectation of the cost under the router's scores.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from spectralmoe.regularizers.costs import cost_shares
from spectralmoe.routing import Routing
from spectralmoe.tape import Record

__all__ = ["expected_cost"]


def expected_cost(record: Record | Routing, costs: Sequence[float] | Tensor | None = None) -> Tensor:
    r"""Compute the expected cost under the router's scores: :math:`\mathrm{mean}_t \sum_e p_{te}\, c_e / \max c`.

    p are the scores of the real tokens, normalised to sum 1. The value lies between c_e / max c of the cheapest expert
    and 1. It is a price and has no target: without another loss, the cheapest expert takes all tokens.

    Args:
        costs: c, one cost for each expert, in any unit; None takes ``experts.costs()`` of the layer, operations a
            position, and 0 for zero experts.

    Raises:
        UserError: costs are not one positive number for each expert, or are missing for a ``Routing`` without a layer.

    >>> import torch
    >>> from spectralmoe import LinearScorer, Router, TopK
    >>> router = Router(LinearScorer(1, 2), TopK(1))
    >>> _ = router.scorer.weight.data.copy_(torch.tensor([[3.0], [1.0]]).log())
    >>> round(expected_cost(router(torch.ones(5, 1)), [1.0, 10.0]).item(), 6)  # 3/4 of a tenth, and 1/4
    0.325
    """
    routing = record if isinstance(record, Routing) else record.routing
    importance = routing.real(routing.probs)
    return (importance * cost_shares("expected_cost", record, costs, importance, free=True)).sum()

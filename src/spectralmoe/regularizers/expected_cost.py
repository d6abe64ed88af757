"""Expected cost: a term that asks for cheap experts where they do.

After "PhyG-MoE", arXiv 2601.12798, abstract: a large expert on demand, light experts else. How the authors hold the
compute down is not known; this is the plain expectation of the cost under the router's scores.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from spectralmoe.regularizers.costs import cost_shares
from spectralmoe.routing import Routing
from spectralmoe.tape import Record

__all__ = ["expected_cost"]


def expected_cost(record: Record | Routing, costs: Sequence[float] | Tensor | None = None) -> Tensor:
    r""":math:`\mathrm{mean}_t \sum_e p_{te}\, c_e / \max c`, with the normalised scores p of real tokens.

    Between the share of the cheapest expert and 1. Where p is one-hot, it is the mean cost of what was chosen. It is a
    price, not a target: without a loss that asks for more, the cheapest expert takes all tokens.

    Args:
        costs: c of each expert, any unit; None: what the layer's bank says of one position, ``experts.costs()``, and 0
            for zero experts.

    Raises:
        UserError: costs that are not one positive number an expert; none given with a ``Routing`` alone.

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

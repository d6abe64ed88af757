"""How alike the experts of a layer are: their outputs on shared tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.errors import UserError
from spectralmoe.experts import Experts

__all__ = ["output_similarity"]


@torch.no_grad()
def output_similarity(experts: Experts, x: Tensor, *, among: Sequence[int] | None = None) -> float:
    r"""Mean squared cosine between the outputs of two experts for the same token.

    .. math::
        \frac{1}{N |P|} \sum_t \sum_{(i,j) \in P} \cos^2\big(E_i(x_t), E_j(x_t)\big)

    over all pairs P of two experts and all tokens, whichever expert the router would choose. 1: they write along one
    line; independent random outputs of width D give about 1/D. A token that an expert maps to zero counts as 0.

    Args:
        x: tokens (N, D).
        among: the experts to compare, the live ones say; None: all. Experts that were never trained would pull the
            mean towards chance.

    Returns:
        nan where there are fewer than two experts to compare, or no tokens.

    Raises:
        UserError: ``among`` names an expert that is not there.

    >>> from spectralmoe import FeedForward
    >>> bank = FeedForward(2, dim=4, hidden=8)
    >>> bank.up.data[1], bank.down.data[1] = bank.up[0], -bank.down[0]
    >>> round(output_similarity(bank, torch.randn(10, 4)), 5)
    1.0
    """
    chosen = list(range(experts.num_experts)) if among is None else list(among)
    unknown = [e for e in chosen if not 0 <= e < experts.num_experts]
    if unknown:
        raise UserError(f"output_similarity: no expert {unknown[0]} among the {experts.num_experts} of this bank")
    if len(chosen) < 2 or not len(x):
        return float("nan")
    outputs = torch.stack([F.normalize(experts.expert(x, e).float(), dim=-1) for e in chosen], 1)
    squares = (outputs @ outputs.transpose(1, 2)).square().double().mean(0)
    upper = torch.triu_indices(len(chosen), len(chosen), offset=1)
    return float(squares[upper[0], upper[1]].mean())

"""Paths of tokens: which experts serve the same token, in one layer and from one layer to another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectralmoe.diagnostics.measure import Measure
from spectralmoe.errors import UserError
from spectralmoe.routing import EMPTY, Routing, count_slots

__all__ = ["CELL_TOKENS", "co_activation", "joint_counts", "mutual_information"]

CELL_TOKENS = 5
"""A joint table needs this many tokens for each occupied cell."""

_CHUNK = 2**16


def joint_counts(a: Routing, b: Routing) -> Tensor:
    """Count the tokens that went from each expert of one layer to each expert of another: (E_a, E_b) int64.

    A token counts for the expert with its largest weight; a token without an expert in one of the layers is skipped.
    Counts of several batches can be added up. Yao et al., "ExFlow", arXiv 2401.08383, compute their inter-layer
    affinity from such counts.

    Raises:
        UserError: the routings differ in their number of tokens.

    >>> logits, weights = torch.zeros(3, 2), torch.ones(3, 1)
    >>> a = Routing(logits, weights, torch.tensor([[0], [0], [1]]), logits)
    >>> b = Routing(logits, weights, torch.tensor([[1], [1], [-1]]), logits)
    >>> joint_counts(a, b).tolist()
    [[0, 2], [0, 0]]
    """
    if len(a.logits) != len(b.logits):
        raise UserError(f"joint_counts: one routing has N={len(a.logits)} tokens, the other N={len(b.logits)}")
    first, second = a.top_expert(), b.top_expert().to(a.indices.device)
    seen = (first >= 0) & (first < a.num_experts) & (second >= 0) & (second < b.num_experts)
    cells = torch.where(seen, first * b.num_experts + second, EMPTY)
    return count_slots(cells, a.num_experts * b.num_experts).reshape(a.num_experts, b.num_experts)


def mutual_information(joint: Tensor, *, unit: str = "tokens") -> Measure:
    r"""Measure how much one side of a table of counts (A, B) tells about the other: 0 is nothing, 1 the most possible.

    .. math::
        \frac{I}{\min(H_A, H_B)}, \qquad I = H_A + H_B - H_{AB}, \qquad H = \hat H + \frac{m - 1}{2n}

    I and H are in nats. :math:`\hat H` is the entropy of the shares of n counts in m occupied cells, and the second
    term is the bias correction of Miller, "Note on the bias of information estimates" (1955); without it, independent
    sides would have an I of about (A - 1)(B - 1)/2n. A negative I counts as 0. The tokens are assumed to be independent
    draws. The correction misses cells that are empty by chance, so loads with a long tail keep some bias (0.07 for
    5,000 tokens in two independent layers of 128 experts with shares :math:`\propto i^{-1.5}`).

    There is no data with fewer than ``CELL_TOKENS`` tokens for each occupied cell, where the correction fails, or if a
    side always has the same value.

    >>> str(mutual_information(torch.tensor([[40, 0], [0, 60]]))), str(mutual_information(torch.tensor([[3, 1]])))
    ('1 (100 tokens)', 'no data (4 of 10 tokens)')
    """
    rows, columns, whole = (_entropy(counts) for counts in (joint.sum(1), joint.sum(0), joint.flatten()))
    least, needs = min(rows, columns), max(CELL_TOKENS * int((joint > 0).sum()), 1)
    shared = min(max(rows + columns - whole, 0.0) / least, 1.0) if least > 0 else math.nan
    return Measure.of(shared, joint.sum(), unit, needs)


def co_activation(routing: Routing) -> Tensor:
    """Count the tokens that two experts serve together: (E, E) int64, with each expert's tokens on the diagonal.

    Muennighoff et al., "OLMoE", arXiv 2409.02060, section 5.2, divide each row by its diagonal. In soft routing every
    expert serves every token.

    >>> logits = torch.zeros(2, 3)
    >>> co_activation(Routing(logits, torch.ones(2, 2), torch.tensor([[0, 1], [1, 2]]), logits)).tolist()
    [[1, 1, 0], [1, 2, 1], [0, 1, 1]]
    """
    e = routing.num_experts
    counts = torch.zeros(e, e, dtype=torch.int64, device=routing.indices.device)
    for part in routing.members().split(_CHUNK):
        serves = part.float()
        counts += (serves.T @ serves).round().long()  # sums of at most 2^16 ones are exact in fp32
    return counts


def _entropy(counts: Tensor) -> float:
    """Entropy in nats of a list of counts, with the correction of Miller; 0 without counts."""
    counts = counts[counts > 0].double()
    shares = counts / counts.sum()
    return float(-torch.xlogy(shares, shares).sum() + (len(counts) - 1) / (2 * counts.sum())) if len(counts) else 0.0

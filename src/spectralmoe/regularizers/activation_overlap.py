"""Activation overlap: a term that drives the hidden activations of a token's experts apart.

Hu et al., "Synergistic Intra- and Cross-Layer Regularization Losses for MoE Expert Specialization", arXiv 2602.14159,
equation 4, the specialization loss R_sp. No public code.
Differs: means over tokens and pairs instead of sums, so that its weight does not depend on the batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spectralmoe.errors import one_of
from spectralmoe.regularizers.slots import grams_of_tokens, rows_by_token
from spectralmoe.tape import Record, keeps

__all__ = ["activation_overlap"]

_SMALLEST = 1e-24
"""Squared lengths below count as this: such a row has no direction, and overlaps with nobody."""


@keeps("hidden", argument="kind")
def activation_overlap(record: Record, *, kind: Literal["hidden", "output"] = "hidden") -> Tensor:
    r"""Compute the mean squared cosine between the hidden activations of the experts that serve the same token.

    .. math::
        \frac{1}{|T|} \sum_{t \in T} \frac{1}{|A_t| (|A_t| - 1)} \sum_{e \ne v \in A_t}
        \frac{\langle z_{te}, z_{tv} \rangle^2}{\|z_{te}\|^2 \, \|z_{tv}\|^2}

    :math:`z_{te}` (H,) are the activations of expert e for token t, and :math:`A_t` its experts, without zero experts,
    empty slots and shared experts. T are the real tokens with at least two experts. The value is 0 for orthogonal
    activations and where T is empty, and 1 for parallel ones. Scaling an expert's activations does not change it, so
    they cannot escape by shrinking. The gradient reaches the weights that make z, not the router.

    Args:
        record: a record that kept what ``kind`` names: ``record(model, terms=terms)`` does so.
        kind: "hidden", the activations before the down projection (of SwiGLU, the product), for experts that have them;
            or "output", the experts' outputs before the combine weights.

    Raises:
        UserError: the record did not keep the tensors, K = 1, or ``kind`` is unknown.

    >>> import torch
    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, Term, TopK, record
    >>> layer = MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, dim=8, hidden=16))
    >>> layer.experts.up.data[:] = layer.experts.up.data[0].clone()  # all experts read the same
    >>> with record(layer, terms={"overlap": Term(activation_overlap, 2e-3)}) as tape:
    ...     y = layer(torch.randn(32, 8))
    >>> round(activation_overlap(tape[0]).item(), 3)
    1.0
    """
    if kind not in ("hidden", "output"):
        raise one_of("kind of activation_overlap", kind, ["hidden", "output"])
    products = grams_of_tokens(rows_by_token("activation_overlap", record, kind))
    n, k, _ = products.shape
    inverse = products.diagonal(dim1=1, dim2=2).clamp_min(_SMALLEST).rsqrt()
    itself = torch.eye(k, dtype=torch.bool, device=products.device)
    cosines = products * inverse.unsqueeze(1) * inverse.unsqueeze(2)
    overlaps = cosines.square().masked_fill(itself, 0).sum((1, 2))
    serves = torch.zeros(n * k, dtype=torch.bool, device=products.device).index_fill(0, record.order, True)
    many = serves.view(n, k).sum(1)
    pairs = many * (many - 1)
    return (overlaps / pairs.clamp_min(1)).sum() / (pairs > 0).sum().clamp_min(1)

"""Overlap of what a token's experts make of it: a term that drives them apart.

Guo et al., "Advancing Expert Specialization for Better MoE", arXiv 2505.22323, the orthogonality loss L_o.
Differs: the mean over tokens instead of the sum; ``form="cosine"`` is ours, for outputs that could escape by shrinking.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.errors import UserError, one_of
from spectralmoe.tape import Record, keeps

__all__ = ["output_overlap"]


@keeps("output")
def output_overlap(
    record: Record, *, form: Literal["projection", "cosine"] = "projection", eps: float = 1e-6
) -> Tensor:
    r"""Mean over real tokens of the overlaps between the outputs :math:`y_{tj}` of the chosen experts A_t of a token.

    "projection": :math:`\sum_{j \ne k \in A_t} \| \frac{\langle y_{tj}, y_{tk} \rangle}{\langle y_{tk}, y_{tk} \rangle
    + \epsilon} y_{tk} \|^2`, which scales with the square of the outputs. "cosine": :math:`\sum_{j \ne k}
    \cos^2(y_{tj}, y_{tk})`, which does not. 0 for orthogonal outputs and without a real token; a zero expert overlaps
    with nobody. Reads the outputs before their combine weights, which ``record(model, terms=terms)`` keeps.

    Raises:
        UserError: outputs that were not kept; one expert a token; an unknown form.

    >>> import torch
    >>> from spectralmoe import LinearScorer, ModuleExperts, MoE, Router, TopK, record
    >>> layer = MoE(Router(LinearScorer(2, 2), TopK(2)), ModuleExperts([torch.nn.Identity(), torch.nn.Identity()]))
    >>> with record(layer, keep="output") as tape:
    ...     y = layer(torch.tensor([[3.0, 4.0]]))
    >>> round(output_overlap(tape[0], form="cosine").item(), 3), round(output_overlap(tape[0]).item(), 3)
    (2.0, 50.0)
    """
    routing, rows = record.routing, record.output.flatten(1)
    n, k = routing.indices.shape
    if k < 2:
        raise UserError(
            f"output_overlap compares the experts of a token, but layer {record.name!r} gives it one (K={k})"
        )
    if form not in ("projection", "cosine"):
        raise one_of("form of output_overlap", form, ["projection", "cosine"])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    outputs = rows.new_zeros(n * k, rows.shape[1]).index_copy(0, record.order, rows).view(n, k, rows.shape[1])
    if form == "cosine":
        outputs = F.normalize(outputs, dim=-1)
    with torch.autocast(rows.device.type, enabled=False):
        products = outputs @ outputs.mT
    squares = products.diagonal(dim1=1, dim2=2)
    shares = products.square()
    if form == "projection":
        shares = shares * (squares / (squares + eps).square()).unsqueeze(1)
    itself = torch.eye(k, dtype=torch.bool, device=rows.device)
    return routing.real(shares.masked_fill(itself, 0).sum((1, 2)))

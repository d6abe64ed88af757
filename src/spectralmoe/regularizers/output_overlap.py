"""Output overlap: a term that drives the outputs of a token's experts apart.

Guo et al., "Advancing Expert Specialization for Better MoE", arXiv 2505.22323, the orthogonality loss L_o. Authors'
code: https://github.com/HongcanGuo/Auxloss-For-Advancing-Expert-Specialization (MIT); it projects an output on the span
of the others, the paper and this file on each of them.
Differs: the mean over tokens instead of the sum. ``form="cosine"`` is ours: outputs cannot make it smaller by
shrinking.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.errors import one_of
from spectralmoe.regularizers.slots import grams_of_tokens, rows_by_token
from spectralmoe.tape import Record, keeps

__all__ = ["output_overlap"]


@keeps("output")
def output_overlap(
    record: Record, *, form: Literal["projection", "cosine"] = "projection", eps: float = 1e-6
) -> Tensor:
    r"""Compute the overlap between the outputs :math:`y_{tj}` of a token's experts A_t, a mean over the real tokens.

    - "projection": :math:`\sum_{j \ne k \in A_t} \| \frac{\langle y_{tj}, y_{tk} \rangle}{\langle y_{tk}, y_{tk}
      \rangle + \epsilon} y_{tk} \|^2`, which grows with the square of the outputs;
    - "cosine": :math:`\sum_{j \ne k \in A_t} \cos^2(y_{tj}, y_{tk})`, which does not depend on their size.

    Both are 0 for orthogonal outputs and without a real token. Zero experts do not count. The outputs are those before
    the combine weights.

    Args:
        record: a record that kept "output": ``record(model, terms=terms)`` does so.
        form: "projection", the paper's, or "cosine".
        eps: epsilon.

    Raises:
        UserError: the record did not keep the outputs, K = 1, or the form is unknown.

    >>> import torch
    >>> from spectralmoe import LinearScorer, ModuleExperts, MoE, Router, TopK, record
    >>> layer = MoE(Router(LinearScorer(2, 2), TopK(2)), ModuleExperts([torch.nn.Identity(), torch.nn.Identity()]))
    >>> with record(layer, keep="output") as tape:
    ...     y = layer(torch.tensor([[3.0, 4.0]]))
    >>> round(output_overlap(tape[0], form="cosine").item(), 3), round(output_overlap(tape[0]).item(), 3)
    (2.0, 50.0)
    """
    if form not in ("projection", "cosine"):
        raise one_of("form of output_overlap", form, ["projection", "cosine"])
    outputs = rows_by_token("output_overlap", record, "output")
    if form == "cosine":
        outputs = F.normalize(outputs, dim=-1)
    products = grams_of_tokens(outputs)
    squares = products.diagonal(dim1=1, dim2=2)
    shares = products.square()
    if form == "projection":
        shares = shares * (squares / (squares + eps).square()).unsqueeze(1)
    itself = torch.eye(products.shape[1], dtype=torch.bool, device=products.device)
    return record.routing.real(shares.masked_fill(itself, 0).sum((1, 2)))

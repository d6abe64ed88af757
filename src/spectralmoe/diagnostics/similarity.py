"""Similarity of the experts of a layer: of their outputs for the same tokens, and of their weights.

``expert_outputs`` runs all tokens through every expert, whichever the router would choose: outputs (E, N, D). Each
similarity is a matrix (E, E), nan where there is too little data. ``mean_offdiagonal`` makes a number of it,
``duplicates`` a list of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.diagnostics.measure import Measure
from spectralmoe.diagnostics.watch import Watched
from spectralmoe.errors import UserError
from spectralmoe.linalg import largest_entry, over_largest

__all__ = [
    "CKA_TOKENS",
    "centred_cosines",
    "cosine_matrix",
    "duplicates",
    "expert_outputs",
    "gram_cosine",
    "linear_cka",
    "mean_offdiagonal",
    "subspace_overlap",
    "weight_cosine",
]

CKA_TOKENS = 16
"""The least number N of tokens for a CKA; for unlike experts it scatters by about sqrt(2)/N around 0."""

_BLOCK = 2**22
_RELATIVE = 1e-12


@torch.no_grad()
def expert_outputs(layer: Watched, x: Tensor, among: Sequence[int] | None = None) -> Tensor:
    """Run all tokens x (N, D) through each expert: (E, N, D), in fp32 or float64.

    Args:
        layer: a layer of an open ``watch``.
        among: the experts to run, in this order; None runs all.

    Raises:
        UserError: ``among`` names an expert that does not exist.
    """
    chosen = _chosen("expert_outputs", among, layer.num_experts)
    outputs = [layer.expert(x, e) for e in chosen]
    precise = torch.promote_types(outputs[0].dtype if outputs else x.dtype, torch.float32)
    return torch.stack([y.to(precise) for y in outputs]) if outputs else x.new_zeros(0, *x.shape, dtype=precise)


def cosine_matrix(outputs: Tensor) -> Tensor:
    r"""Compute the mean over tokens of the squared cosine of two experts' outputs (E, N, D): (E, E) float64.

    It is :math:`\frac1N \sum_t \cos^2(y_{it}, y_{jt})`: 1 if the outputs are parallel for every token, about 1/D for
    independent random outputs. A token that an expert maps to zero counts as 0. Without tokens it is nan.

    >>> y = torch.tensor([[[1.0, 0.0]], [[-2.0, 0.0]], [[0.0, 3.0]]])  # three experts, one token
    >>> cosine_matrix(y)[0].tolist()
    [1.0, 1.0, 0.0]
    """
    precise = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    rows = F.normalize(over_largest(precise, 2).transpose(0, 1), dim=-1)
    return (rows @ rows.mT).square().double().mean(0)


def centred_cosines(outputs: Tensor) -> Tensor:
    r"""Compute ``cosine_matrix`` of the outputs (E, N, D) minus each expert's mean over the tokens: (E, E) float64.

    It is :math:`\frac1N \sum_t \cos^2(y_{it} - \bar y_i,\; y_{jt} - \bar y_j)`. Two experts that add the same vector to
    every token are alike in ``cosine_matrix``; here only what differs between tokens counts. An expert whose output is
    the same for every token counts as 0.

    >>> y = torch.randn(2, 50, 8)
    >>> raw, centred = (f(y + 100)[0, 1].item() for f in (cosine_matrix, centred_cosines))
    >>> raw > 0.9, centred < 0.5
    (True, True)
    """
    scaled = over_largest(outputs.double(), (1, 2))
    moved = scaled - scaled.mean(1, keepdim=True)
    constant = moved.norm(dim=-1, keepdim=True) <= _RELATIVE * scaled.norm(dim=-1, keepdim=True)
    return cosine_matrix(moved.masked_fill(constant, 0))


def linear_cka(outputs: Tensor, *, unbiased: bool = True) -> Tensor:
    r"""Compute the linear centred kernel alignment (CKA) of two experts' outputs (E, N, D): (E, E) float64.

    .. math::
        \frac{\langle \tilde K_i, \tilde K_j\rangle}{\|\tilde K_i\|\,\|\tilde K_j\|}, \qquad K_i = Y_i Y_i^\top

    It is 1 for outputs that are equal up to a shift, a rotation and a scale. Kornblith et al., arXiv 1905.00414,
    section 3, centre the rows and columns of K (``unbiased=False``); that is close to 1 for *any* outputs if there are
    fewer tokens than the width. By default K is centred so that the inner product is the unbiased HSIC of Song et al.,
    "Feature Selection via Dependence Maximization", JMLR 13 (2012), equation 5; that is about 0 for unlike experts
    whatever N, and may be a little below.

    It is nan with fewer than ``CKA_TOKENS`` tokens, and for an expert whose output is the same for every token. The
    Gram matrices take E N^2 numbers of memory.

    >>> y = torch.randn(1, 32, 8)
    >>> turned = y @ torch.linalg.qr(torch.randn(8, 8))[0]
    >>> round(float(linear_cka(torch.cat([y, 3 * turned + 1]))[0, 1]), 4)
    1.0
    """
    e, n, _ = outputs.shape
    if n < CKA_TOKENS:
        return outputs.new_full((e, e), math.nan, dtype=torch.float64)
    moved = over_largest(outputs.double(), (1, 2))
    size = moved.square().sum((1, 2))
    moved = moved - moved.mean(1, keepdim=True)
    gram = moved @ moved.mT
    if unbiased:
        gram.diagonal(dim1=1, dim2=2).zero_()
        sums = gram.sum(-1)
        share = sums / (n - 2) - sums.sum(-1, keepdim=True) / (2 * (n - 1) * (n - 2))
        gram = gram - share[:, :, None] - share[:, None, :]
        gram.diagonal(dim1=1, dim2=2).zero_()
    flat = gram.flatten(1)
    norm = flat.norm(dim=1)
    return _ratio(flat @ flat.T, torch.where(norm > _RELATIVE * size, norm, math.nan))


def subspace_overlap(outputs: Tensor, rank: int) -> Tensor:
    r"""Compute the overlap of the leading subspaces of two experts' outputs (E, N, D): (E, E) float64, 0 to 1.

    It is :math:`\|V_i^\top V_j\|_F^2/r`, with V (D, r) the leading right singular vectors of an expert's outputs, not
    centred: 1 for the same subspace, about r/D for random ones. Hu et al., "LoRA", arXiv 2106.09685, section 7.2.

    It is nan for an expert whose outputs do not span r directions, as with fewer than r tokens, or are not finite.

    Args:
        rank: r.

    Raises:
        UserError: rank < 1.
    """
    if rank < 1:
        raise UserError(f"subspace_overlap: rank must be at least 1, got {rank}")
    e, n, width = outputs.shape
    if rank > min(n, width):
        return outputs.new_full((e, e), math.nan, dtype=torch.float64)
    y = over_largest(outputs.double(), (1, 2))
    y = y.masked_fill(~y.isfinite().all(2).all(1)[:, None, None], 0)
    values, vectors = torch.linalg.eigh(y @ y.mT if n <= width else y.mT @ y)
    values, vectors = values[:, -rank:], vectors[:, :, -rank:]
    spanned = values[:, 0] > _RELATIVE * values[:, -1]
    if n <= width:
        vectors = y.mT @ vectors / values[:, None].clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    basis = vectors.mT.reshape(e * rank, width)
    overlap = (basis @ basis.T).square().reshape(e, rank, e, rank).sum((1, 3)) / rank
    known: Tensor = overlap.masked_fill(~(spanned[:, None] & spanned), math.nan)
    return known


def weight_cosine(weights: Tensor) -> Tensor:
    """Compute the cosine of two experts' weights (E, P): (E, E) float64; nan for an expert whose weights are all 0.

    The same network with its hidden units in another order gets a low cosine, so a low value does not show that two
    experts differ.
    """
    gram = torch.zeros(len(weights), len(weights), dtype=torch.float64, device=weights.device)
    largest = largest_entry(weights.detach(), 1).double()
    for block in weights.detach().split(max(_BLOCK // max(len(weights), 1), 1), dim=1):
        part = block.double() / largest
        gram += part @ part.T
    return gram_cosine(gram)


def gram_cosine(gram: Tensor) -> Tensor:
    """Compute the cosines of E vectors by their inner products (E, E); nan for a vector of zeros."""
    norm = gram.diagonal().sqrt()
    return _ratio(gram, torch.where(norm > 0, norm, math.nan))


def mean_offdiagonal(matrix: Tensor) -> Measure:
    """Compute the mean of a similarity (E, E) over the pairs of different experts for which it is finite.

    >>> str(mean_offdiagonal(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))), str(mean_offdiagonal(torch.eye(1)))
    ('0.5 (1 pairs)', 'no data (0 of 1 pairs)')
    """
    pairs = matrix[*_upper(matrix)]
    known = pairs[pairs.isfinite()].double()
    return Measure.of(known.mean(), len(known), "pairs")


def duplicates(matrix: Tensor, threshold: float) -> list[tuple[int, int]]:
    """Return the pairs i < j whose similarity in (E, E) reaches ``threshold``, in order.

    >>> duplicates(torch.tensor([[1.0, 0.2, 0.99], [0.2, 1.0, 0.1], [0.99, 0.1, 1.0]]), 0.98)
    [(0, 2)]
    """
    i, j = _upper(matrix)
    alike = matrix[i, j] >= threshold
    return list(zip(i[alike].tolist(), j[alike].tolist(), strict=True))


def _chosen(owner: str, among: Sequence[int] | None, num_experts: int) -> list[int]:
    chosen = list(range(num_experts)) if among is None else list(among)
    unknown = [e for e in chosen if not 0 <= e < num_experts]
    if unknown:
        raise UserError(f"{owner}: no expert {unknown[0]} among the {num_experts} of this bank")
    return chosen


def _upper(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of all pairs i < j."""
    i, j = torch.triu_indices(len(matrix), len(matrix), 1, device=matrix.device)
    return i, j


def _ratio(products: Tensor, norms: Tensor) -> Tensor:
    """Inner products (E, E) over the norms (E,) of both."""
    return products / norms[:, None] / norms

"""How alike the experts of a layer are: their outputs on shared tokens, and their weights.

Shared tokens means all of them through every expert, whichever the router would choose (``expert_outputs``): outputs
(E, N, D). Each likeness is a matrix (E, E), nan where there is too little data; ``mean_offdiagonal`` makes it a number,
``duplicates`` a list of copies.
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
from spectralmoe.experts import Experts
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
    "output_similarity",
    "subspace_overlap",
    "weight_cosine",
]

CKA_TOKENS = 16
"""Fewer tokens have no CKA: for unlike experts it scatters by about sqrt(2)/N around 0."""

_BLOCK = 2**22
_RELATIVE = 1e-12


@torch.no_grad()
def expert_outputs(layer: Watched, x: Tensor, among: Sequence[int] | None = None) -> Tensor:
    """All tokens x (N, D) through each expert: (E, N, D), at least fp32.

    Args:
        among: the experts to run, in this order; None: all.

    Raises:
        UserError: ``among`` names an expert that is not there.
    """
    chosen = _chosen("expert_outputs", among, layer.num_experts)
    outputs = [layer.expert(x, e) for e in chosen]
    precise = torch.promote_types(outputs[0].dtype if outputs else x.dtype, torch.float32)
    return torch.stack([y.to(precise) for y in outputs]) if outputs else x.new_zeros(0, *x.shape, dtype=precise)


def cosine_matrix(outputs: Tensor) -> Tensor:
    r"""Mean over tokens of the squared cosine of two experts' outputs (E, N, D): (E, E) float64.

    :math:`\frac1N \sum_t \cos^2(y_{it}, y_{jt})`. 1: they write along one line; independent random outputs give about
    1/D. A token that an expert maps to zero counts as 0. nan without tokens.
    """
    precise = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    rows = F.normalize(over_largest(precise, 2).transpose(0, 1), dim=-1)
    return (rows @ rows.mT).square().double().mean(0)


def centred_cosines(outputs: Tensor) -> Tensor:
    r"""``cosine_matrix`` of outputs (E, N, D) less each expert's mean over the tokens: (E, E) float64.

    :math:`\frac1N \sum_t \cos^2(y_{it} - \bar y_i,\; y_{jt} - \bar y_j)`. Experts that add the same vector to every
    token are alike without the centring; here they are alike only if they answer alike to what differs between tokens.
    An expert whose output is the same for every token counts as 0.

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
    r"""Linear centred kernel alignment of two experts' outputs (E, N, D): (E, E) float64.

    .. math::
        \frac{\langle \tilde K_i, \tilde K_j\rangle}{\|\tilde K_i\|\,\|\tilde K_j\|}, \qquad K_i = Y_i Y_i^\top

    1 for outputs that are equal up to a shift, a rotation and a scale. Kornblith et al., arXiv 1905.00414, section 3,
    with rows and columns of K centred: close to 1 for *any* outputs of fewer tokens than their width. By default
    centred so that the inner product is the unbiased HSIC of Song et al., "Feature Selection via Dependence
    Maximization", JMLR 13 (2012), equation 5: about 0 for unlike experts whatever N, at times a little below.

    nan with fewer than ``CKA_TOKENS`` tokens, and for an expert whose output is the same for every token. The Gram
    matrices take E N^2 numbers.

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
    r"""Overlap of the subspaces that two experts' outputs (E, N, D) fill most: (E, E) float64, 0 to 1.

    :math:`\|V_i^\top V_j\|_F^2/r`, V (D, r) the top right singular vectors of an expert's outputs, not centred.
    1: the same subspace; random subspaces give about r/D. Hu et al., "LoRA", arXiv 2106.09685, section 7.2.

    nan for an expert whose outputs (fewer than r tokens, say) do not span r directions or are not finite.

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
    found: Tensor = overlap.masked_fill(~(spanned[:, None] & spanned), math.nan)
    return found


def weight_cosine(weights: Tensor) -> Tensor:
    """Cosine of two experts' weights (E, P): (E, E) float64, summed up in blocks; nan for an expert without weight.

    Blind to a permutation of hidden units: a low value does not say that two experts differ.
    """
    gram = torch.zeros(len(weights), len(weights), dtype=torch.float64, device=weights.device)
    largest = largest_entry(weights.detach(), 1).double()
    for block in weights.detach().split(max(_BLOCK // max(len(weights), 1), 1), dim=1):
        part = block.double() / largest
        gram += part @ part.T
    return gram_cosine(gram)


def gram_cosine(gram: Tensor) -> Tensor:
    """Cosines from the inner products (E, E) of E vectors; nan for a vector of zeros."""
    norm = gram.diagonal().sqrt()
    return _ratio(gram, torch.where(norm > 0, norm, math.nan))


def mean_offdiagonal(matrix: Tensor) -> Measure:
    """Mean of a symmetric likeness (E, E) over the pairs of two experts that have one; counts the pairs.

    >>> str(mean_offdiagonal(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))), str(mean_offdiagonal(torch.eye(1)))
    ('0.5 (1 pairs)', 'no data (0 of 1 pairs)')
    """
    pairs = matrix[*_upper(matrix)]
    known = pairs[pairs.isfinite()].double()
    return Measure.of(known.mean(), len(known), "pairs")


def duplicates(matrix: Tensor, threshold: float) -> list[tuple[int, int]]:
    """The pairs i < j whose likeness in (E, E) reaches ``threshold``, in order.

    >>> duplicates(torch.tensor([[1.0, 0.2, 0.99], [0.2, 1.0, 0.1], [0.99, 0.1, 1.0]]), 0.98)
    [(0, 2)]
    """
    i, j = _upper(matrix)
    alike = matrix[i, j] >= threshold
    return list(zip(i[alike].tolist(), j[alike].tolist(), strict=True))


@torch.no_grad()
def output_similarity(experts: Experts, x: Tensor, *, among: Sequence[int] | None = None) -> float:
    r"""Mean squared cosine between the outputs of two experts for the same token.

    .. math::
        \frac{1}{N |P|} \sum_t \sum_{(i,j) \in P} \cos^2\big(E_i(x_t), E_j(x_t)\big)

    over all pairs P of two experts and all tokens: ``cosine_matrix`` of a bank, as one number.

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
    chosen = _chosen("output_similarity", among, experts.num_experts)
    if len(chosen) < 2 or not len(x):
        return math.nan
    mean = mean_offdiagonal(cosine_matrix(torch.stack([experts.expert(x, e).float() for e in chosen]))).value
    return math.nan if mean is None else mean


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

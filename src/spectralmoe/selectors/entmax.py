"""Soft routing with exact zeros: entmax stands in place of the softmax.

The gate of Oldfield et al., "Multilinear Mixture of Experts: Scalable Expert Specialization through Factorization"
(muMoE), arXiv 2402.12550, NeurIPS 2024; entmax itself is of Peters, Niculae, Martins, "Sparse Sequence-to-Sequence
Models", arXiv 1905.05702, section 3.
Differs: Newton's method finds the threshold, which needs no sort and works for every alpha. The normalisation of the
logits is optional and over a token's logits (the paper also has one over the batch). The gate starts as its scorer
does, not at zero.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.errors import UserError
from spectralmoe.linalg import without_autocast
from spectralmoe.selectors.soft import Soft

__all__ = ["Entmax", "entmax"]

_STEPS = 8  # of Newton, before the one with gradient: enough for 256 experts in float64, see the test


class Entmax(Soft):
    r"""Gives each token all E experts with the weights :math:`\mathrm{entmax}_\alpha(s)`, many of them exactly 0.

    .. math:: p_e = \left[(\alpha - 1)\, s_e - \tau\right]_+^{1/(\alpha - 1)}, \qquad \sum_e p_e = 1

    :math:`\alpha = 1` is the softmax, 2 the sparsemax. A weight of 0 has the gradient 0, so an expert that no token
    uses gets no gradient.

    Args:
        alpha: 1, or 1.01 to 2; the larger, the fewer experts have a weight above 0.
        norm: whether the logits of a token first go through a LayerNorm without weights, as in muMoE. Then the scale
            of the logits does not matter.

    Raises:
        UserError: ``alpha`` is neither 1 nor 1.01 to 2.

    >>> selector, logits = Entmax(), torch.tensor([[2.0, 1.0, -1.0]])
    >>> [[round(p, 4) for p in row] for row in selector.weigh(logits, selector.choose(logits)).tolist()]
    [[0.8307, 0.1693, 0.0]]
    """

    def __init__(self, alpha: float = 1.5, *, norm: bool = False) -> None:
        super().__init__()
        if alpha != 1 and not 1.01 <= alpha <= 2:  # between them powers of 100 and more leave no precision
            raise UserError(f"Entmax: alpha must be 1 (the softmax) or lie between 1.01 and 2 (sparsemax), got {alpha}")
        self.alpha, self.norm = alpha, norm

    def scored(self, logits: Tensor) -> Tensor:
        return entmax(F.layer_norm(logits, logits.shape[-1:]) if self.norm else logits, self.alpha)


@without_autocast
def entmax(logits: Tensor, alpha: float = 1.5) -> Tensor:
    r"""Compute weights (..., E) with sum 1 from logits (..., E): :math:`[(\alpha - 1) s - \tau]_+^{1/(\alpha - 1)}`.

    :math:`\tau` is where the norm :math:`\|[(\alpha - 1) s - \tau]_+\|_q`, q = 1/(alpha - 1), falls to 1. The norm is
    convex in :math:`\tau`, so Newton's steps from the left never overshoot. The last step carries the gradient
    :math:`\partial p / \partial s = \mathrm{diag}(r) - r r^\top / \sum r` with :math:`r = p^{2 - \alpha}`.

    >>> entmax(torch.tensor([0.5, 0.5, -3.0]), 2.0).tolist()
    [0.5, 0.5, 0.0]
    """
    if alpha == 1:
        return logits.softmax(-1)
    power = 1 / (alpha - 1)
    scaled = (alpha - 1) * (logits - logits.detach().amax(-1, keepdim=True))
    threshold = torch.full_like(scaled[..., :1], -1.0)
    for _ in range(_STEPS):
        norm, slope = _norm(scaled.detach(), threshold, power)
        threshold = threshold + (norm - 1) / slope
    norm, slope = _norm(scaled, threshold, power)
    threshold = threshold + (norm - 1) / slope
    weights = _excess(scaled, threshold) ** power
    return weights / weights.sum(-1, keepdim=True)


def _norm(scaled: Tensor, threshold: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """The norm of the excess (..., 1), and how fast it falls with the threshold, without gradient."""
    excess = _excess(scaled, threshold)
    norm = (excess**power).sum(-1, keepdim=True) ** (1 / power)
    excess = excess.detach()
    lower = excess.sign() if power == 1 else excess ** (power - 1)
    return norm, lower.sum(-1, keepdim=True) / norm.detach() ** (power - 1)


def _excess(scaled: Tensor, threshold: Tensor) -> Tensor:
    """What lies above the threshold; 0 below it, whose gradient is 0 too."""
    return (scaled - threshold).clamp_min(0)

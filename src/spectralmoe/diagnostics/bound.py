r"""A bound of the gap between training and test error of sparse mixtures, and the complexity that goes into it.

Zhao et al., "Generalization Error Analysis for Sparse Mixture-of-Experts: A Preliminary Study", arXiv 2403.17404, for
binary classification. Written from the equation; the grouping of its terms follows from Natarajan's lemma, which bounds
the masks that a router makes of 2N samples by :math:`(2N)^d |Y|^{2d}`, |Y| the ways to choose K of E experts. Differs:
that count may be taken exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectralmoe.errors import UserError

__all__ = ["empirical_rademacher", "generalization_bound", "natarajan_linear"]


def generalization_bound(
    n: int,
    experts: int,
    k: int,
    *,
    natarajan: float,
    rademacher: float,
    lipschitz: float = 1.0,
    delta: float = 0.05,
    exact: bool = False,
) -> dict[str, float]:
    r"""What the gap between training and test error stays under with probability 1 - delta, and its terms.

    .. math::
        4 C\,\mathcal R_N + 2 \sqrt{\frac{2 d \ln |Y| + d \ln(2N) + \ln(4/\delta)}{2N}},\quad
        \ln |Y| = K \Big(1 + \ln\frac EK\Big)

    It falls in N and delta, and rises in K, E and d. For networks of usual sizes it is far above 1: an order of things
    and no estimate. It knows neither how many samples an expert sees (N K / E) nor what the experts may approximate.

    Args:
        n: N, training samples.
        experts, k: E, and K of them for each sample.
        natarajan: d, the Natarajan dimension of the class of routers; 0 for one that is fixed before the samples are
            seen; ``natarajan_linear`` for linear ones.
        rademacher: :math:`\mathcal R_N`, the complexity of one expert (``empirical_rademacher``).
        lipschitz: C, of the loss in the experts' outputs.
        exact: take :math:`\ln |Y| = \ln \binom EK`, which is no larger; it falls in K beyond E / 2.

    Returns:
        By name: ``masks``, ``samples`` and ``confidence``, the three terms under the root; ``router``, twice the root;
        ``experts``, the first term; ``bound``, the sum of the last two.

    Raises:
        UserError: a number out of range.

    >>> terms = generalization_bound(1000, 8, 1, natarajan=64, rademacher=0.0)
    >>> round(terms["bound"], 2), terms["bound"] == terms["router"]
    (1.33, True)
    """
    for name, value, least in (("n", n, 1), ("experts", experts, 1), ("k", k, 1)):
        if not isinstance(value, int) or value < least:
            raise UserError(f"generalization_bound: {name} must be at least {least}, got {value}")
    if k > experts:
        raise UserError(f"generalization_bound: k={k} exceeds the E={experts} experts")
    for name, number in (("natarajan", natarajan), ("rademacher", rademacher), ("lipschitz", lipschitz)):
        if not 0 <= number < math.inf:
            raise UserError(f"generalization_bound: {name} must be 0 or more, got {number}")
    if not 0 < delta < 1:
        raise UserError(f"generalization_bound: delta must lie between 0 and 1, got {delta}")
    ways = math.log(math.comb(experts, k)) if exact else k * (1 + math.log(experts / k))
    terms = {
        "masks": 2 * natarajan * ways,
        "samples": natarajan * math.log(2 * n),
        "confidence": math.log(4 / delta),
    }
    terms["router"] = 2 * math.sqrt(sum(terms.values()) / (2 * n))
    terms["experts"] = 4 * lipschitz * rademacher
    terms["bound"] = terms["router"] + terms["experts"]
    return terms


@torch.no_grad()
def empirical_rademacher(features: Tensor, radius: float, *, draws: int | None = 200, seed: int = 0) -> float:
    r"""How well linear functions :math:`x \mapsto w^\top x`, :math:`\|w\| \le B`, fit random signs on these samples.

    .. math:: \mathcal R_N = \frac BN\, \mathbb E_\sigma \Big\| \sum_n \sigma_n x_n \Big\|
        \le \frac BN \Big(\sum_n \|x_n\|^2\Big)^{1/2}

    The mean over ``draws`` of the signs, as a share of the root of their mean square, whose expectation is known: it
    never exceeds the bound on the right.

    Args:
        features: x (N, D), what an expert reads.
        radius: B.
        draws: of the signs; None: the bound on the right.

    Raises:
        UserError: features of another shape or without samples; a radius below 0; no draw.

    >>> x = torch.randn(50, 4)
    >>> 0 < empirical_rademacher(x, 1.0) <= empirical_rademacher(x, 1.0, draws=None)
    True
    """
    if features.dim() != 2 or not len(features):
        raise UserError(f"empirical_rademacher: takes features (N, D), got shape {tuple(features.shape)}")
    if not 0 <= radius < math.inf:
        raise UserError(f"empirical_rademacher: radius must be 0 or more, got {radius}")
    if draws is not None and draws < 1:
        raise UserError(f"empirical_rademacher: draws must be at least 1, got {draws}")
    x = features.detach().double().cpu()
    bound = radius * float(x.norm()) / len(x)
    if draws is None or bound == 0:
        return bound
    signs = torch.randint(2, (draws, len(x)), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    norms = (signs @ x).norm(dim=1)
    return bound * float(norms.mean() / norms.square().mean().sqrt().clamp_min(torch.finfo(norms.dtype).tiny))


def natarajan_linear(dim: int, experts: int) -> int:
    """The Natarajan dimension of linear routers on D features with E experts: of the order D E, up to logarithms.

    For choices of one expert; the same number stands in for choices of K. It hides a factor E in the d of
    ``generalization_bound``.

    Raises:
        UserError: a number below 1.

    >>> natarajan_linear(64, 8)
    512
    """
    for name, value in (("dim", dim), ("experts", experts)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"natarajan_linear: {name} must be at least 1, got {value}")
    return dim * experts

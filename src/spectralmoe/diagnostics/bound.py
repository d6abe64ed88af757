r"""A bound on the gap between training and test error of sparse mixtures, and the complexities that it needs.

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
    r"""Compute a bound on the gap between training and test error that holds with probability 1 - delta, and its terms.

    .. math::
        4 C\,\mathcal R_N + 2 \sqrt{\frac{2 d \ln |Y| + d \ln(2N) + \ln(4/\delta)}{2N}},\quad
        \ln |Y| = K \Big(1 + \ln\frac EK\Big)

    It falls with N and delta, and rises with K, E and d. For networks of usual sizes it is far above 1, so it can order
    networks and estimates nothing. It uses neither how many samples an expert sees (N K / E) nor what the experts can
    approximate.

    Args:
        n: N, the number of training samples.
        experts, k: E and K.
        natarajan: d, the Natarajan dimension of the class of routers: 0 for a router that is fixed before the samples
            are seen, ``natarajan_linear`` for linear routers.
        rademacher: :math:`\mathcal R_N`, the Rademacher complexity of one expert (``empirical_rademacher``).
        lipschitz: C, the Lipschitz constant of the loss in the experts' outputs.
        delta: the probability with which the bound may fail.
        exact: whether :math:`\ln |Y| = \ln \binom EK` is used, which is never larger, and falls with K beyond E / 2.

    Returns:
        Numbers by name: ``masks``, ``samples`` and ``confidence``, the three terms under the root; ``router``, the
        second summand; ``experts``, the first summand; ``bound``, the sum of both.

    Raises:
        UserError: a number is out of range.

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
    r"""Estimate the Rademacher complexity of linear functions :math:`x \mapsto w^\top x`, :math:`\|w\| \le B`.

    .. math:: \mathcal R_N = \frac BN\, \mathbb E_\sigma \Big\| \sum_n \sigma_n x_n \Big\|
        \le \frac BN \Big(\sum_n \|x_n\|^2\Big)^{1/2}

    It says how well such functions fit random signs on these samples. The expectation is estimated by ``draws`` draws
    of the signs, scaled so that the estimate never exceeds the bound on the right.

    Args:
        features: x (N, D), the inputs of an expert.
        radius: B.
        draws: the number of draws; None returns the bound on the right.
        seed: the seed of the draws.

    Raises:
        UserError: the features are not (N, D) or have no samples, the radius is below 0, or draws < 1.

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
    """Return D E, the order of the Natarajan dimension of linear routers with E experts, up to logarithms.

    This is for the choice of one expert; the same number is used for the choice of K.

    Raises:
        UserError: a number is below 1.

    >>> natarajan_linear(64, 8)
    512
    """
    for name, value in (("dim", dim), ("experts", experts)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"natarajan_linear: {name} must be at least 1, got {value}")
    return dim * experts

"""Certificates: they bound how far a token may move before the router chooses other experts.

The bound is the margin over the slope. Tsuzuku et al., "Lipschitz-Margin Training", arXiv 1802.04034, section 4.1: a
gap between two logits of an L-Lipschitz map lasts for gap / (sqrt(2) L). Hein & Andriushchenko, arXiv 1705.08475,
theorem 2.1: the same with the slope of each pair in a ball around the token. Differs: the set of the k largest instead
of the largest, exact distances for gates that are affine, cosines or quadrics, and a processor before the router.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from spectralmoe.diagnostics.local_bounds import Travel, travel_bound
from spectralmoe.errors import UserError
from spectralmoe.router import Router
from spectralmoe.scorers import Scorer
from spectralmoe.scorers.base import gamma
from spectralmoe.selectors import Balanced, NoisyTopK, TopK

__all__ = ["attack_distance", "routing_radius"]

_CHUNK = 256
_OCTAVES = 16.0
_BISECTIONS = 13
_RIVALS = 8
_DAMPING = 0.7
_OVERSHOOT = 1.01
_ROOM = 0.25  # tokens up to max ** 0.25, so that no product of squares overflows


@torch.no_grad()
def routing_radius(router: Router, x: Tensor, *, processor: nn.Sequential | None = None) -> Tensor:
    r"""Compute a distance (N,) within which the set of experts chosen for each token of x (N, D) cannot change.

    .. math::
        r(x) = \min_{i\ \text{chosen},\ j\ \text{not}} d_{ij}(x), \qquad
        d_{ij} = \frac{s_i(x) - s_j(x)}{\|a_i - a_j\|}

    This holds for logits that are affine in x with rows a (linear, prototype), and is exact there. Other scorers
    compute d_ij by ``flip_distance``: it is exact for cosine, eigenbasis and saturated with one anchor; otherwise it is
    :math:`(s_i - s_j)/(\sqrt2 L)` with L from ``lipschitz()``, or a bound of the scorer's own. ``Balanced`` chooses by
    :math:`p_i + b_i`, p the softmax of the logits. With the gap :math:`g = p_i + b_i - p_j - b_j` its bound is
    :math:`d_{ij} = \max\big(\sqrt2\,g,\ \log(1 + g/\max(p_i, p_j))/\sqrt2\big)/L`. A tie has the radius 0, soft routing
    an infinite one. No other radius reaches tokens of a norm above 4e9 (in fp32), where squares may overflow.

    The radius is never more than the true distance for a router that computes in fp32 (float64 if x is): the rounding
    error of its logits anywhere in the ball is taken off (Higham's bounds, ``Scorer.rounding``), and a choice that
    rounding decides has the radius 0. It is computed in float64 and returned in the router's precision.

    Args:
        router: the router, in evaluation mode if it chooses at random in training.
        x: tokens (N, D).
        processor: layers in front of the router; x is then their input. The radius is the largest r (within 0.3%, from
            below) for which the processor maps the ball around x into the ball that is safe at its output
            (``local_bounds.travel_bound``).

    Raises:
        UserError: x is not (N, D), the selector does not choose each token's largest values, or there is no bound for
            the scorer or for a layer of the processor.

    >>> from spectralmoe import LinearScorer
    >>> router = Router(LinearScorer(2, 2), TopK(1))
    >>> router.scorer.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> routing_radius(router, torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
    tensor([1.4142, 0.0000])
    """
    precision = torch.promote_types(x.dtype, torch.float32)
    k, router, processor = _prepare(router, x, processor)
    parts = [_radius(router, k, part, processor, precision) for part in x.double().split(_CHUNK)]
    return torch.cat(parts).to(precision)


def attack_distance(
    router: Router, x: Tensor, *, processor: nn.Sequential | None = None, steps: int = 30, seed: int = 0
) -> Tensor:
    r"""Search for the nearest change of the chosen experts by gradients: its distance (N,), inf if none is found.

    The distance is an upper bound, to be compared with ``routing_radius``. The search goes towards each of the 8
    experts j that are nearest to being chosen. With the margin m, the smallest chosen value less that of j, it moves
    from a start near x to the point of the linearised boundary that is nearest to x, :math:`y \leftarrow x + g\,(g
    \cdot (y - x) - m(y))/\|g\|^2,\ g = \nabla m(y)`, damped. In the end bisection shortens the way to each token's
    nearest change.

    Args:
        router, x, processor: as in ``routing_radius``.
        steps: the number of steps of the search, and of the bisection.
        seed: the seed of the starts.

    Raises:
        UserError: as ``routing_radius``.

    >>> from spectralmoe import LinearScorer
    >>> router, x = Router(LinearScorer(8, 4), TopK(2)), torch.randn(5, 8)
    >>> bool((routing_radius(router, x) <= attack_distance(router, x) * 1.0001).all())
    True
    """
    k, router, processor = _prepare(router, x, processor)
    dtype, x = torch.promote_types(x.dtype, torch.float32), x.detach().double()
    if k == router.num_experts:
        return x.new_full(x.shape[:1], torch.inf, dtype=dtype)

    def values(y: Tensor) -> Tensor:
        return _values(router, y if processor is None else processor(y))

    with torch.no_grad():
        order = values(x).argsort(dim=-1, descending=True, stable=True)
    rivals = order[:, k : k + _RIVALS]
    many = rivals.shape[1]
    chosen, rows = (t.repeat_interleave(many, 0) for t in (order[:, :k], x))
    noise = torch.randn(rows.shape, dtype=rows.dtype, generator=torch.Generator().manual_seed(seed)).to(x.device)
    start = rows + 1e-3 * noise * (rows.square().mean(-1, keepdim=True).sqrt() + 1e-3)
    distances = _search(values, rows, start, chosen=chosen, rival=rivals.reshape(-1, 1), steps=steps)
    return distances.view(-1, many).amin(-1).to(dtype)


def _prepare(router: Router, x: Tensor, processor: nn.Sequential | None) -> tuple[int, Router, nn.Sequential | None]:
    """k (E for soft routing), then copies in float64; refuses selectors whose choice has no radius."""
    selector = router.selector
    if x.dim() != 2:
        raise UserError(f"certificate: x must be tokens (N, D), got shape {tuple(x.shape)}; flatten it first")
    if router.soft:
        return router.num_experts, router, None
    name = type(selector).__name__
    if isinstance(selector, NoisyTopK) and selector.training:
        raise UserError("certificate: NoisyTopK chooses at random in training; call router.eval() first")
    if not isinstance(selector, TopK | NoisyTopK | Balanced):
        raise UserError(f"certificate: {name} does not choose each token's k largest values; use TopK or Balanced")
    if isinstance(selector, Balanced) and selector.score != "softmax":
        raise UserError("certificate: Balanced has a bound for softmax scores only; use score='softmax' or TopK")
    router, processor = copy.deepcopy((router, processor))
    if isinstance(router.selector, Balanced):  # counted from the least one, as the router rounds them
        router.selector.bias -= router.selector.bias.amin()
    return selector.k, router.double(), processor and processor.double()


def _values(router: Router, z: Tensor) -> Tensor:
    """(N, E) whose k largest the selector chooses."""
    if z.shape[1] != router.scorer.dim:
        raise UserError(f"certificate: tokens are {z.shape[1]} wide at the router, made for D={router.scorer.dim}")
    logits, selector = router.scorer(z), router.selector
    return selector.ranked(logits) if isinstance(selector, Balanced) else logits


def _radius(router: Router, k: int, x: Tensor, processor: nn.Sequential | None, precision: torch.dtype) -> Tensor:
    if k == router.num_experts:
        return x.new_full(x.shape[:1], torch.inf)
    if processor is None:
        return _choice_radius(router, k, x, precision)
    z, travel = travel_bound(processor, x, precision)
    return _pull_back(travel, _choice_radius(router, k, z, precision))


def _choice_radius(router: Router, k: int, z: Tensor, precision: torch.dtype) -> Tensor:
    order = _values(router, z).argsort(dim=-1, descending=True, stable=True)
    over, under = order[:, :k].repeat_interleave(order.shape[1] - k, 1), order[:, k:].repeat(1, k)
    distances: Tensor | None
    if isinstance(router.selector, Balanced):
        distances = _balanced_distance(router.scorer, router.selector, z, over, under, precision=precision)
    else:
        distances = router.scorer.flip_distance(z, over, under, precision=precision)
    if distances is None:
        name = type(router.scorer).__name__
        raise UserError(f"certificate: {name} has no bound; define its affine(), lipschitz() or flip_distance()")
    room = torch.finfo(precision).max ** _ROOM - z.norm(dim=-1)
    return torch.minimum(distances.amin(-1), room).clamp_min(0)


def _balanced_distance(
    scorer: Scorer, selector: Balanced, z: Tensor, over: Tensor, under: Tensor, *, precision: torch.dtype
) -> Tensor:
    """Lower bound (N, P) of the distance at which the biased probabilities of two experts (N, P) may tie, rounded.

    Rounding is taken off the gap: what it may amount to anywhere within the distance without it.
    """
    bound, error = scorer.lipschitz(), scorer.rounding(z, precision)
    if bound is None or error is None:
        name = type(scorer).__name__
        raise UserError(f"certificate: {name} has no lipschitz() bound, which Balanced needs; use TopK")
    probs, bias = selector.scores(scorer(z)), selector.bias
    one, two = probs.gather(1, over), probs.gather(1, under)
    gap, larger = one - two + bias[over] - bias[under], torch.maximum(one, two)
    moved = _moved_logits(gap, larger)
    size = z.norm(dim=-1, keepdim=True) + (moved / bound if bound > 0 else 0)
    logit_error = error[0].amax() + error[1].amax() * size + error[2].amax() * size.square()
    largest = (larger.log() + 2**0.5 * moved + 2 * logit_error).exp().clamp_max(1)
    terms = 2 * probs.shape[1] + 12
    rounding = (2 * largest).clamp_max(0.5) * logit_error + gamma(terms, precision) * largest
    rounding = rounding + gamma(2, precision) * (largest + bias.amax() + 1)
    moved = _moved_logits(gap - 2 * rounding, larger)
    return torch.where(moved > 0, moved / bound, moved)


def _moved_logits(gap: Tensor, larger: Tensor) -> Tensor:
    r"""Lower bound of how far the logits move before a gap between probabilities, biased or not, is closed.

    In the logits the slope of p_i - p_j is at most :math:`1/\sqrt2` (the softmax Jacobian's norm is at most 1/2) and at
    most :math:`\sqrt2\,m`, m = max(p_i, p_j) the ``larger``, where log m in turn has a slope of at most
    :math:`\sqrt2`.
    """
    local = torch.log1p(gap / larger.clamp_min(torch.finfo(larger.dtype).tiny)) / 2**0.5
    return torch.where(gap > 0, torch.maximum(2**0.5 * gap, local), gap.clamp_min(0))


def _pull_back(travel: Travel, reach: Tensor) -> Tensor:
    """The largest r with ``travel(r) <= reach``, from below: bisection on log2(r / reach)."""
    low, high = torch.full_like(reach, -_OCTAVES), torch.full_like(reach, _OCTAVES)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        fits = travel(reach * 2**middle) <= reach
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    radius = reach * torch.where(low > -_OCTAVES, 2**low, 0)
    return torch.where(travel(torch.full_like(reach, torch.inf)) <= reach, torch.inf, radius)


@torch.enable_grad()
def _search(
    values: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, chosen: Tensor, rival: Tensor, steps: int
) -> Tensor:
    """Distance of the nearest change (N,) for one rival (N, 1) of the chosen (N, k), started at y."""

    def changed(y: Tensor) -> Tensor:
        kept = values(y).topk(chosen.shape[1]).indices.sort(-1).values == chosen.sort(-1).values
        return ~kept.all(-1)

    best, distance = x, torch.full_like(x[:, 0], torch.inf)
    for _ in range(steps):
        y = y.detach().requires_grad_()
        scores = values(y)
        margin = scores.gather(1, chosen).amin(-1) - scores.gather(1, rival).squeeze(1)
        slope = torch.autograd.grad(margin.sum(), y)[0]
        with torch.no_grad():
            ahead = (slope * (y - x)).sum(-1) - margin
            goal = x + slope * (ahead / slope.square().sum(-1).clamp_min(1e-30))[:, None]
            y = y + _DAMPING * (goal - y)
            tried = x + _OVERSHOOT * (y - x)
            nearer = changed(tried) & ((tried - x).norm(dim=-1) < distance)
            best = torch.where(nearer[:, None], tried, best)
            distance = torch.where(nearer, (tried - x).norm(dim=-1), distance)
    inside, outside = torch.zeros_like(distance), torch.ones_like(distance)
    with torch.no_grad():
        for _ in range(steps):
            middle = (inside + outside) / 2
            flips = changed(x + middle[:, None] * (best - x))
            inside, outside = torch.where(flips, inside, middle), torch.where(flips, middle, outside)
    return outside * distance

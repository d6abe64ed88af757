"""Stability of a router's choice: under noise, between precisions or checkpoints, and near ties.

A choice is the *set* of experts of a token. Padding, and tokens of which a capacity emptied a slot, are left out,
because their choice is not known. The choice of soft routing never changes and has no margin.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.diagnostics.measure import TOKENS, Measure
from spectralmoe.diagnostics.watch import Watched
from spectralmoe.errors import UserError
from spectralmoe.routing import Routing

__all__ = [
    "NEAR",
    "changed_between",
    "margins",
    "near_ties",
    "noise_flips",
    "precision_flips",
    "sound_flips",
    "tie_counts",
]

NEAR = 0.01
"""A choice is near a tie if the score of the best expert left out is within this share of the last one chosen."""

_ROUNDING = 0.01


def changed_between(a: Routing, b: Routing, needs: int = 1) -> Measure:
    """Compute the share of tokens whose set of experts differs between two routings of the same tokens.

    The routings may come from two checkpoints, precisions or runs. For one expert a token this is 1 minus the "router
    saturation" of Muennighoff et al., "OLMoE", arXiv 2409.02060, section 5.1; differs: a token counts as changed if any
    of its experts does. Tokens with logits that are not finite are left out.

    Args:
        needs: the least number of tokens for a value.

    Raises:
        UserError: the routings differ in their number of tokens or experts.

    >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    >>> a = Routing(logits, torch.ones(2, 2), torch.tensor([[0, 1], [1, 2]]), logits.softmax(-1))
    >>> b = Routing(logits, torch.ones(2, 2), torch.tensor([[1, 0], [0, 1]]), logits.softmax(-1))
    >>> str(changed_between(a, b))
    '0.5 (2 tokens)'
    """
    if a.logits.shape != b.logits.shape:
        (n, e), (tokens, experts) = a.logits.shape, b.logits.shape
        raise UserError(f"changed_between: one routing has N={n}, E={e}, the other N={tokens}, E={experts}")
    both = _whole(a) & _whole(b) & a.logits.isfinite().all(-1) & b.logits.isfinite().all(-1)
    changed = (a.members() != b.members()).any(-1)[both]
    return Measure.of(changed.double().mean(), len(changed), needs=needs)


@torch.no_grad()
def noise_flips(layer: Watched, x: Tensor, noise: float = 0.05, seed: int = 0) -> Measure:
    r"""Compute the share of tokens whose choice changes under noise, :math:`x + \nu\,\|x\|\,u`.

    u is uniform on the unit sphere. The measure needs at least 64 tokens.

    Args:
        layer: a layer of an open ``watch``.
        x: tokens (N, D); those in half precision are routed in fp32, so that rounding has no effect.
        noise: nu, the length of the step in units of the token's norm.
        seed: the seed of the noise.

    Raises:
        UserError: the noise is negative.
    """
    moved, dtype = _moved(x, noise, seed), _fp32_if_half(x)
    if not len(x):
        return Measure.of(math.nan, 0, needs=TOKENS)
    return changed_between(layer.route(x.to(moved), dtype), layer.route(moved, dtype), TOKENS)


@torch.no_grad()
def precision_flips(layer: Watched, x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Measure:
    """Compute the share of tokens x (N, D) whose choice in ``dtype`` differs from that in fp32 (float64 if x is).

    It needs at least 64 tokens. If a model was loaded in half precision, the effect of rounding its weights is not
    seen.
    """
    if not len(x):
        return Measure.of(math.nan, 0, needs=TOKENS)
    exact = layer.route(x.to(torch.promote_types(x.dtype, torch.float32)), _fp32_if_half(x))
    return changed_between(exact, layer.route(x, dtype), TOKENS)


@torch.no_grad()
def sound_flips(experts: int, top_k: int | None, width: int, tokens: int, seed: int = 0) -> Measure:
    r"""Compute ``precision_flips`` in bf16 for a random linear router of the same size, to compare a router with.

    Its rows are drawn from :math:`N(0, I/D)`, its tokens from :math:`N(0, I)`. Without a K below E there is no data.

    Args:
        experts, top_k, width, tokens: E, K, D and N.
        seed: the seed of the draws.

    >>> sound_flips(8, 2, 64, 2048).value < 0.01 < sound_flips(256, 8, 64, 2048).value
    True
    """
    if top_k is None or top_k >= experts:
        return Measure.of(math.nan, 0, needs=TOKENS)
    draw = torch.Generator().manual_seed(seed)
    x, rows = torch.randn(tokens, width, generator=draw), torch.randn(experts, width, generator=draw) / width**0.5
    exact, rounded = F.linear(x, rows), F.linear(x.bfloat16(), rows.bfloat16()).float()
    changed = exact.topk(top_k).indices.sort().values != rounded.topk(top_k).indices.sort().values
    return Measure.of(changed.any(-1).double().mean(), tokens, needs=TOKENS)


def margins(routing: Routing) -> Tensor:
    r"""Compute the relative gap between the last expert chosen and the best one left out: (N,).

    .. math::
        \frac{s_{(k)} - s_{(k+1)}}{|s_{(k)}|}

    s are the scores that the selector chooses by; 0 is a tie. For softmax scores this is :math:`1 - e^{-\Delta}` with
    the gap :math:`\Delta` of the logits. The same formula is used for plain sigmoid scores, of which fp32 rounds large
    ones to 1; with a selection bias these are real ties, because the bias is added to the rounded scores.

    It is nan for a token that lost a slot, has no expert or all of them, or whose s_(k) underflowed. It is nan for all
    tokens if the scores contradict a choice by more than 1% (rounding to bf16 is 0.4%; such a small gap counts as a
    tie): then the choice was not made by these scores alone, but with a selection bias that they do not hold, with
    noise, or by the experts.

    >>> logits = torch.tensor([[0.5, 0.4, 0.1], [0.2, 0.2, 0.6]]).log()
    >>> margins(Routing(logits, torch.ones(2, 1), torch.tensor([[0], [2]]), logits.softmax(-1)))
    tensor([0.2000, 0.6667])
    """
    scores, logits, chosen = routing.scores.detach(), routing.logits.detach(), routing.members()
    if not scores.numel():
        return scores.new_full(scores.shape[:1], math.nan)
    worst, best = _edge(scores, chosen)
    gates = (scores - logits.sigmoid()).abs().amax() <= 4 * torch.finfo(scores.dtype).eps
    over, under = _edge(logits, chosen)
    known = _whole(routing) & ~chosen.all(-1) & (gates | (worst.abs() >= torch.finfo(scores.dtype).tiny))
    gaps = torch.where(gates, -torch.expm1(under - over), (worst - best) / worst.abs()).masked_fill(~known, math.nan)
    contradicted = (gaps < -_ROUNDING).any()
    return gaps.clamp_min(0).masked_fill(contradicted, math.nan)


def tie_counts(values: Tensor, within: float = NEAR) -> tuple[Tensor, Tensor]:
    """Count the tokens that have a margin, given all margins (N,), and those whose margin is at most ``within``."""
    known = values.isfinite()
    return known.sum(), (known & (values <= within)).sum()


def near_ties(routing: Routing, within: float = NEAR) -> Measure:
    """Compute the share of tokens whose margin (``margins``) is at most ``within``.

    Only tokens that have a margin count. For soft routing, and if the choice was not made by the scores alone, there is
    no data.
    """
    judged, ties = tie_counts(margins(routing), within)
    return Measure.of(ties.double() / judged, judged)


def _moved(x: Tensor, noise: float, seed: int) -> Tensor:
    """Tokens x (N, D) after a step of ``noise`` times their norm in a random direction, at least fp32."""
    if not noise >= 0:
        raise UserError(f"noise_flips: noise must not be negative, got {noise}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    draw = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    step: Tensor = noise * x.norm(dim=-1, keepdim=True) * F.normalize(draw, dim=-1).to(x)
    return x + step


def _edge(values: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The least of the values (N, E) of the chosen experts, and the largest of the others: (N,) each."""
    return values.masked_fill(~chosen, math.inf).amin(-1), values.masked_fill(chosen, -math.inf).amax(-1)


def _fp32_if_half(x: Tensor) -> torch.dtype | None:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None


def _whole(routing: Routing) -> Tensor:
    """Tokens with all the experts that they asked for (N,)."""
    filled = routing.indices >= 0
    if routing.mask is not None:
        filled = filled & routing.mask[:, None]
    return filled.any(-1) if routing.asked is None else filled.all(-1)

"""How firm a router's choice is: under noise, between precisions or checkpoints, and how near a tie.

A choice is the *set* of experts of a token. Tokens without all their experts (padding, or slots that a capacity
emptied) are left out: what they chose is not known. Soft routing always chooses everything: it never changes and has
no margin.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.diagnostics.measure import Measure
from spectralmoe.diagnostics.watch import Watched
from spectralmoe.errors import UserError
from spectralmoe.router import Router
from spectralmoe.routing import Routing

__all__ = ["changed_between", "changed_by_noise", "margins", "near_ties", "noise_flips", "precision_flips"]

_ROUNDING = 0.01


def changed_between(a: Routing, b: Routing) -> Measure:
    """Share of tokens whose set of experts differs between two routings of the same tokens.

    Of two checkpoints, two precisions, two runs. 1 minus the "router saturation" of Muennighoff et al., "OLMoE", arXiv
    2409.02060, section 5.1, for one expert a token; differs: a token counts as changed when any of its experts does.

    Raises:
        UserError: the routings are of other numbers of tokens or experts.

    >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    >>> a = Routing(logits, torch.ones(2, 2), torch.tensor([[0, 1], [1, 2]]), logits.softmax(-1))
    >>> b = Routing(logits, torch.ones(2, 2), torch.tensor([[1, 0], [0, 1]]), logits.softmax(-1))
    >>> str(changed_between(a, b))
    '0.5 (2 tokens)'
    """
    if a.logits.shape != b.logits.shape:
        (n, e), (tokens, experts) = a.logits.shape, b.logits.shape
        raise UserError(f"changed_between: one routing has N={n}, E={e}, the other N={tokens}, E={experts}")
    both = _whole(a) & _whole(b)
    changed = (_members(a) != _members(b)).any(-1)[both]
    return Measure.of(changed.double().mean(), len(changed))


@torch.no_grad()
def noise_flips(layer: Watched, x: Tensor, noise: float = 0.05, seed: int = 0) -> Measure:
    r"""Share of tokens whose choice changes for :math:`x + \nu\,\|x\|\,u`, u uniform on the sphere.

    Args:
        x: tokens (N, D); those in half precision are routed in fp32, so that rounding takes no part.
        noise: nu, the length of the step in units of the token's own norm.

    Raises:
        UserError: a negative noise.
    """
    moved, dtype = _moved("noise_flips", x, noise, seed), _fp32_if_half(x)
    if not len(x):
        return Measure.of(math.nan, 0)
    return changed_between(layer.route(x.to(moved), dtype), layer.route(moved, dtype))


@torch.no_grad()
def precision_flips(layer: Watched, x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Measure:
    """Share of tokens x (N, D) whose choice in ``dtype`` is not that in fp32 (float64 for float64 tokens)."""
    if not len(x):
        return Measure.of(math.nan, 0)
    exact = layer.route(x.to(torch.promote_types(x.dtype, torch.float32)), _fp32_if_half(x))
    return changed_between(exact, layer.route(x, dtype))


def margins(routing: Routing) -> Tensor:
    r"""Relative gap of the selection scores at the edge of the choice: (N,), precise as the scores.

    .. math::
        \frac{s_{(k)} - s_{(k+1)}}{|s_{(k)}|}

    s_(k) the worst chosen and s_(k+1) the best expert left out: 0 is a tie. For softmax scores,
    :math:`1 - e^{-\Delta}` with the gap :math:`\Delta` of the logits.

    nan for a token that lost a slot, has no expert, or has them all, and where s_(k) underflowed. nan for all when the
    scores contradict the choice of one by more than 1% (rounding to bf16 is 0.4%; such a small gap counts as a tie):
    then the choice was not made from them alone, but with a selection bias that they do not hold (``Balanced``), with
    noise, or by the experts.

    >>> logits = torch.tensor([[0.5, 0.4, 0.1], [0.2, 0.2, 0.6]]).log()
    >>> margins(Routing(logits, torch.ones(2, 1), torch.tensor([[0], [2]]), logits.softmax(-1)))
    tensor([0.2000, 0.6667])
    """
    scores, chosen = routing.scores.detach(), _members(routing)
    if not scores.numel():
        return scores.new_full(scores.shape[:1], math.nan)
    worst = scores.masked_fill(~chosen, math.inf).amin(-1)
    best = scores.masked_fill(chosen, -math.inf).amax(-1)
    known = _whole(routing) & ~chosen.all(-1) & (worst.abs() >= torch.finfo(scores.dtype).tiny)
    gaps = ((worst - best) / worst.abs()).masked_fill(~known, math.nan)
    contradicted = (gaps < -_ROUNDING).any()
    return gaps.clamp_min(0).masked_fill(contradicted, math.nan)


def near_ties(routing: Routing, within: float = 0.01) -> Measure:
    """Share of the tokens with a margin whose margin is at most ``within``: a hair decides which expert they get.

    No data for soft routing, and where the scores do not tell the choice (``margins``).
    """
    known = margins(routing)
    known = known[known.isfinite()]
    return Measure.of((known <= within).double().mean(), len(known))


@torch.no_grad()
def changed_by_noise(router: Router, x: Tensor, *, noise: float = 0.05, seed: int = 0) -> float:
    r"""``noise_flips`` of a router: the share of tokens whose set of chosen experts changes under noise.

    Args:
        x: tokens (N, D).
        noise: nu, the length of the step in units of the token's own norm.

    Returns:
        0 to 1; nan without tokens.

    Raises:
        UserError: a negative noise.

    >>> from spectralmoe import LinearScorer, TopK
    >>> router = Router(LinearScorer(8, 4), TopK(1))
    >>> changed_by_noise(router, torch.randn(100, 8), noise=0.0)
    0.0
    """
    moved = _moved("changed_by_noise", x, noise, seed)
    share = changed_between(router(x), router(moved)).value if len(x) else None
    return math.nan if share is None else share


def _moved(owner: str, x: Tensor, noise: float, seed: int) -> Tensor:
    """Tokens x (N, D) after a step of ``noise`` times their norm in a random direction, at least fp32."""
    if not noise >= 0:
        raise UserError(f"{owner}: noise must not be negative, got {noise}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    draw = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    step: Tensor = noise * x.norm(dim=-1, keepdim=True) * F.normalize(draw, dim=-1).to(x)
    return x + step


def _fp32_if_half(x: Tensor) -> torch.dtype | None:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None


def _members(routing: Routing) -> Tensor:
    """Whether each expert serves each token (N, E)."""
    e = routing.num_experts
    slots = torch.where((routing.indices >= 0) & (routing.indices < e), routing.indices, e)
    return torch.zeros(len(slots), e + 1, dtype=torch.bool, device=slots.device).scatter_(1, slots, True)[:, :e]


def _whole(routing: Routing) -> Tensor:
    """Tokens with all the experts that they asked for (N,)."""
    filled = routing.indices >= 0
    if routing.mask is not None:
        filled = filled & routing.mask[:, None]
    return filled.any(-1) if routing.asked is None else filled.all(-1)

"""Selector: logits -> which experts, with which weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Self, final

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.errors import UserError, one_of
from spectralmoe.parts import Part
from spectralmoe.routing import EMPTY, Score, apply_score

__all__ = ["Score", "Selector", "check_fits", "check_k", "largest", "share_of", "take"]


class Selector(Part):
    """Base of all selectors. ``choose`` decides without gradient, ``weigh`` is the only differentiable path.

    A subclass implements ``choose`` and, where they differ from a plain gather of softmax or sigmoid scores, ``scored``
    and ``weigh``; it keeps every constructor argument as an attribute of the same name.
    """

    score: Score = "softmax"
    normalize: bool = False

    per_token: bool = True
    """Whether a token's choice depends on that token alone."""

    soft: bool = False
    """Whether every token uses every expert; known once the selector is bound."""

    fills: bool = False
    """Whether every slot of a real token holds an expert, whatever the logits; known once the selector is bound.

    Without a mask a layer then knows how many slots are filled; else, on a device, the host waits for the number, once
    a forward.
    """

    def bind(self, num_experts: int) -> None:
        """Called once by the router with E: check the arguments against it, allocate state."""

    def scored(self, logits: Tensor) -> Tensor | Score:
        """The value of ``Routing.score``: the name of the activation, or scores (N, E) that the selector computes.

        By name the scores are computed where they are read, and never where nobody does.
        """
        return self.score

    @final
    def scores(self, logits: Tensor) -> Tensor:
        """The scores (N, E) that the choice and the weights come from; a subclass changes them in ``scored``."""
        scored = self.scored(logits)
        return scored if isinstance(scored, Tensor) else apply_score(scored, logits)

    def ranked(self, logits: Tensor) -> Tensor:
        """What a top-k choice is the largest of (N, E): the scores, and a selection bias where there is one."""
        return self.scores(logits)

    def choose(self, logits: Tensor, *, mask: Tensor | None = None, context: dict[str, Any] | None = None) -> Tensor:
        """Indices (N, K) int64 from detached logits (N, E); -1 in an empty slot and in every slot of a masked row."""
        raise NotImplementedError

    def limit(self, wanted: Tensor, num_experts: int) -> Tensor:
        """The choice (N, K) under a bound on what an expert takes: -1 where a slot is dropped. No bound by default."""
        return wanted

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        """Combine weights (N, K) of the chosen experts, with gradient; 0 in an empty slot."""
        if not self.normalize:
            return take(self.scores(logits), indices)
        chosen = take(logits, indices)  # log-scores up to a constant a token, which the softmax takes out
        chosen = (chosen if self.score == "softmax" else F.logsigmoid(chosen)).masked_fill(indices < 0, -torch.inf)
        empty = (indices < 0).all(-1, keepdim=True)
        return chosen.masked_fill(empty, 0).softmax(-1).masked_fill(indices < 0, 0)

    def select(self, indices: Sequence[int] | Tensor) -> Self:
        """A selector for the experts ``indices`` of its router alone, in this order, with what it remembers of them.

        Whatever it counts by E goes by the experts that are left; k, p and capacities stay. A buffer with dimensions,
        its own or of a selector inside it, is taken for one entry an expert; others stay.

        Raises:
            UserError: it cannot choose among so few.
        """
        chosen = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        selector = copy.deepcopy(self)
        memories = [(module, dict(module._buffers)) for module in selector.modules()]
        for module, _ in memories:
            module._buffers.clear()
        with torch.random.fork_rng(devices=[]):  # what ``bind`` draws is put back below
            selector.bind(len(chosen))
        for module, memory in memories:
            for name, values in memory.items():
                module._buffers[name] = values[chosen] if values is not None and values.dim() else values
        return selector


def take(values: Tensor, indices: Tensor) -> Tensor:
    """``values`` (N, E) at ``indices`` (N, K); 0 in an empty slot."""
    return values.gather(1, indices.clamp_min(0)).masked_fill(indices < 0, 0)


def largest(values: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """Indices (N, k) of the k largest values a row, largest first; -1 in masked rows."""
    indices = values.topk(k, dim=-1).indices
    return indices if mask is None else indices.masked_fill(~mask[:, None], EMPTY)


def check_k(owner: str, k: int, normalize: bool, score: str) -> None:
    """Refuse a k below 1, an unknown score, and k = 1 with weights that are renormalised over one slot."""
    if score not in ("softmax", "sigmoid"):
        raise one_of("score", score, ["sigmoid", "softmax"])
    if not isinstance(k, int) or k < 1:
        raise UserError(f"{owner}: k must be at least 1, got {k}; soft routing over all experts is Soft()")
    if k == 1 and normalize:
        raise UserError(
            f"{owner}: k=1 with normalize=True makes every weight the constant 1, so the router gets no gradient; "
            "use normalize=False or k >= 2"
        )


def check_fits(owner: str, k: int, num_experts: int) -> None:
    """Refuse a k larger than the number of experts."""
    if k > num_experts:
        raise UserError(f"{owner}: k={k} experts a token were asked for, but the router has E={num_experts}")


def share_of(total: Tensor, factor: float, num_experts: int) -> Tensor:
    """ceil(total * factor / E) as int64, safe from rounding up an exact quotient."""
    return torch.ceil(total.double() * factor / num_experts - 1e-9).long()

"""A selector is the part of a router that turns logits into the experts of each token, and their weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Self, final

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.errors import UserError, check_whole, one_of
from spectralmoe.parts import Part
from spectralmoe.routing import EMPTY, Score, apply_score

__all__ = ["Score", "Selector", "check_fits", "check_k", "largest", "share_of", "take"]


class Selector(Part):
    """The base class of all selectors: ``choose`` picks experts without gradient, ``weigh`` weighs them with gradient.

    A subclass implements ``choose``. It overrides ``scored`` and ``weigh`` if its weights are not the softmax or
    sigmoid scores of the chosen experts. It keeps every constructor argument as an attribute of the same name, because
    saving reads them back.
    """

    score: Score = "softmax"
    normalize: bool = False

    per_token: bool = True
    """Whether a token's choice depends on that token alone."""

    soft: bool = False
    """Whether every token uses every expert; known once the selector is bound."""

    fills: bool = False
    """Whether every slot of a real token always holds an expert; known once the selector is bound.

    Then, and without a mask, a layer knows how many slots are filled. Otherwise it has to wait for the GPU to count
    them, once a forward.
    """

    def bind(self, num_experts: int) -> None:
        """Check the arguments against E and allocate buffers; the router calls this once."""

    def scored(self, logits: Tensor) -> Tensor | Score:
        """Return ``Routing.score``: "softmax" or "sigmoid", or scores (N, E) that the selector computes itself.

        If it is a name, the scores are computed only where something reads them.
        """
        return self.score

    @final
    def scores(self, logits: Tensor) -> Tensor:
        """Return the scores (N, E) that choice and weights come from; a subclass changes them in ``scored``."""
        scored = self.scored(logits)
        return scored if isinstance(scored, Tensor) else apply_score(scored, logits)

    def ranked(self, logits: Tensor) -> Tensor:
        """Return the values (N, E) whose largest k are chosen: the scores, plus a selection bias if there is one."""
        return self.scores(logits)

    def choose(self, logits: Tensor, *, mask: Tensor | None = None, context: dict[str, Any] | None = None) -> Tensor:
        """Choose experts by detached logits (N, E): indices (N, K) int64, -1 in empty slots and for padding.

        Args:
            mask: (N,) bool, True for real tokens; None if all are.
            context: side information by name, one row a token.
        """
        raise NotImplementedError

    def limit(self, wanted: Tensor, num_experts: int) -> Tensor:
        """Empty the slots beyond what an expert may take: indices (N, K), -1 there. By default there is no bound."""
        return wanted

    def emptied(self, indices: Tensor) -> Tensor:
        """Empty the slots of experts that may not be used now, which a replayed choice may name: indices (N, K)."""
        return indices

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        """Return the combine weights (N, K) of the chosen experts, with gradient; 0 in an empty slot."""
        if not self.normalize:
            return take(self.scores(logits), indices)
        chosen = take(logits, indices)  # log-scores up to a constant a token, which the softmax takes out
        chosen = (chosen if self.score == "softmax" else F.logsigmoid(chosen)).masked_fill(indices < 0, -torch.inf)
        empty = (indices < 0).all(-1, keepdim=True)
        return chosen.masked_fill(empty, 0).softmax(-1).masked_fill(indices < 0, 0)

    def select(self, indices: Sequence[int] | Tensor) -> Self:
        """Return a selector for the experts ``indices`` of its router alone, in this order; they keep their biases.

        What depends on E goes by the number that is left; k, p and capacities stay. A buffer that is not a scalar is
        assumed to have one entry an expert.

        Raises:
            UserError: too few experts are left, for example fewer than k.
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
    """Return the entries (N, K) of ``values`` (N, E) at ``indices`` (N, K); 0 in an empty slot."""
    return values.gather(1, indices.clamp_min(0)).masked_fill(indices < 0, 0)


def largest(values: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """Return the indices (N, k) of the k largest values of each row, largest first; -1 where ``mask`` is False."""
    indices = values.topk(k, dim=-1).indices
    return indices if mask is None else indices.masked_fill(~mask[:, None], EMPTY)


def check_k(owner: str, k: int, normalize: bool, score: str) -> None:
    """Refuse a k below 1, an unknown score, and k = 1 with weights that are renormalised over one slot."""
    if score not in ("softmax", "sigmoid"):
        raise one_of("score", score, ["sigmoid", "softmax"])
    check_whole(owner, "k", k, cure="; soft routing over all experts is Soft()")
    if k == 1 and normalize:
        raise UserError(
            f"{owner}: k=1 with normalize=True makes every weight the constant 1, so the router gets no gradient; "
            "use normalize=False or k >= 2"
        )


def check_fits(owner: str, k: int, num_experts: int) -> None:
    """Refuse a k larger than the number of experts."""
    if k > num_experts:
        raise UserError(
            f"{owner}: k={k} experts a token were asked for, but the router has E={num_experts}; choose k up to E"
        )


def share_of(total: Tensor, factor: float, num_experts: int) -> Tensor:
    """Return ceil(total * factor / E) as int64; 1e-9 is taken off, so that rounding does not lift an exact quotient."""
    return torch.ceil(total.double() * factor / num_experts - 1e-9).long()

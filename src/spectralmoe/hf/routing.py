"""Reads what the router of a Hugging Face MoE layer returned as our ``Routing``, by shape and type, never by family.

Known forms (N tokens, E experts, K slots): logits (N, E), weights (N, K), indices (N, K), in this order in most
families; combine weights (N, E) that are 0 but for K experts, and logits (Llama 4); a one-hot mask (B, S, E) without
the tokens that overran a capacity, top probability (B, S, 1), logits (Switch). Some return probabilities where the name
says logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spectralmoe.diagnostics.entropy import are_probabilities
from spectralmoe.hf.scores import Choice, Form, choice_scores, find_form, real_logits
from spectralmoe.routing import EMPTY, Routing

__all__ = ["Returned", "read_returned"]


@dataclass(frozen=True, slots=True)
class Returned:
    """The tensors that a router returned, by role; with gradient if they came with it.

    Attributes:
        logits: (N, E), under this name in the model and in its precision: may be probabilities.
        weights: (N, K) combine weights, 0 in an empty slot; fp32 (float64 stays).
        indices: (N, K) int64, -1 where a capacity left a token out.
        capped: whether the router has a capacity.
    """

    logits: Tensor
    weights: Tensor
    indices: Tensor
    capped: bool = False

    @torch.no_grad()
    def form(self, choice: Choice) -> Form:
        """The form of the scores: softmax or sigmoid of the logits, with what is added."""
        return find_form(_wide(self.logits), self.weights, self.indices, choice, are_probabilities(self.logits))

    def routing(self, form: Form) -> Routing:
        """As our ``Routing``, in fp32 (float64 stays): its scores are what the combine weights are made from."""
        logits = real_logits(_wide(self.logits), form.probabilities)
        asked = torch.full((), self.indices.numel(), device=logits.device) if self.capped else None
        return Routing(logits, self.weights, self.indices, form.score(logits), asked=asked)

    def ranked(self, choice: Choice, form: Form) -> Routing:
        """The same with the values (N, E) that the choice was made from as its scores, selection bias included."""
        routing = self.routing(form)
        return replace(routing, score=choice_scores(routing.logits, self.indices, choice, form))


def read_returned(
    returned: Any, num_experts: int, raw: Callable[[], Tensor | None], top_k: int | None
) -> Returned | None:
    """Sort what a router returned into logits, weights and indices; None if it cannot be read.

    Args:
        raw: gives the router's own matrix on its input (N, E), which tells logits from other tensors of their shape;
            or None, where it is not known.
        top_k: K, if the router says it.

    >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    >>> weights, indices = logits.softmax(-1).topk(2)
    >>> read_returned((indices, logits, weights), 3, lambda: None, 2).indices.tolist()  # whatever the order
    [[0, 1], [1, 2]]
    """
    parts = returned if isinstance(returned, Sequence) else [returned]
    tensors = [part.reshape(-1, part.shape[-1]) for part in parts if isinstance(part, Tensor) and part.dim()]
    whole = [t for t in tensors if not t.is_floating_point()]
    floats = [t for t in tensors if t.is_floating_point()]
    logits = _logits([t for t in floats if t.shape[1] == num_experts], raw)
    if logits is None or len(whole) > 1:
        return None
    rest = [t for t in floats if t is not logits and len(t) == len(logits)]
    if not whole:
        return _from_dense(logits, [t for t in rest if t.shape == logits.shape], top_k)
    picked = whole[0].long()
    if len(picked) != len(logits):
        return None
    weights = [t for t in rest if t.shape == picked.shape]
    if picked.shape == logits.shape and not weights:
        return _from_mask(logits, picked, rest)
    if picked.shape == logits.shape and num_experts > 2 and bool((picked <= 1).all()):  # a mask, no indices
        return _from_dense(logits, weights, top_k)
    return Returned(logits, _wide(weights[0]), picked) if len(weights) == 1 else None


def _logits(wide: list[Tensor], raw: Callable[[], Tensor | None]) -> Tensor | None:
    """The tensor nearest to the product with the router's own matrix, else the first."""
    logits = raw() if len(wide) > 1 else None
    if logits is None:
        return wide[0] if wide else None
    return min(wide, key=lambda t: float((t - logits).detach().abs().max()) if t.shape == logits.shape else torch.inf)


def _from_dense(logits: Tensor, dense: list[Tensor], top_k: int | None) -> Returned | None:
    """Combine weights (N, E) with zeros for what was not chosen."""
    if len(dense) != 1:
        return None
    weights, indices = dense[0].topk(top_k or int((dense[0] > 0).sum(-1).max()))
    return Returned(logits, _wide(weights), torch.where(weights > 0, indices, EMPTY))


def _from_mask(logits: Tensor, mask: Tensor, rest: list[Tensor]) -> Returned | None:
    """A mask of one expert a token, none for those left out, and one weight a token."""
    weights = [t for t in rest if t.shape[1] == 1]
    if len(weights) != 1:
        return None
    on = mask.any(-1, keepdim=True)
    indices = torch.where(on, mask.argmax(-1, keepdim=True), EMPTY)
    return Returned(logits, torch.where(on, _wide(weights[0]), 0), indices, capped=True)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))

"""Routing: the value that says which experts serve each token, with which weights.

The letters of shapes are the same in code, docstrings, docs and errors:
N tokens, D width, E experts, K slots a token, M filled slots, H expert hidden width, R rank of a basis, B batch,
S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

__all__ = ["EMPTY", "Routing", "Score", "apply_score", "count_slots"]

Score = Literal["softmax", "sigmoid"]

EMPTY = -1
"""The index of a slot that holds no expert."""


def apply_score(score: Score, logits: Tensor) -> Tensor:
    """Return the softmax of the logits (..., E) over the experts, or the sigmoid of each."""
    return logits.softmax(-1) if score == "softmax" else logits.sigmoid()


def count_slots(indices: Tensor, num_experts: int) -> Tensor:
    """Count how many slots hold each expert: (E,) int64; empty slots are not counted.

    >>> count_slots(torch.tensor([[0, 2], [2, -1]]), 3).tolist()
    [1, 0, 2]
    """
    flat = indices.reshape(-1)
    slots = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=indices.device)
    return counts.scatter_add(0, slots, torch.ones_like(slots))[:num_experts]


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router decided for N tokens: the experts of each token, and their weights.

    A token has K slots; a slot holds one expert, or none. Iterating gives ``logits, weights, indices``.

    Attributes:
        logits: (N, E) what the scorer gave, with gradient, in fp32 (float64 if the tokens are).
        weights: (N, K) combine weights with gradient, in the same precision; 0 in an empty slot.
        indices: (N, K) int64, the expert in each slot, -1 in an empty one. An index that is not below
            ``experts.num_experts`` is a zero expert: it is counted and adds nothing to the output.
        score: how ``scores`` follow from the logits, "softmax" or "sigmoid"; or the scores themselves, (N, E), if the
            selector computes its own.
        mask: (N,) bool, True for a real token; None if all are.
        shape: the leading dimensions that N was flattened from.
        soft: whether every token uses every expert.
        asked: how many slots were filled before a capacity emptied some, a scalar int64; None without a capacity.
        live: if the choice was replayed, what the router itself would have decided on the same logits, with weights
            without gradient; else None.
        full: whether every slot is known to hold an expert without reading ``indices``, for which a CPU would wait.

    >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    >>> r = Routing(logits, torch.ones(2, 1), torch.tensor([[0], [1]]))
    >>> r.counts().tolist(), r.load().tolist()
    ([1, 1, 0], [0.5, 0.5, 0.0])
    """

    logits: Tensor
    weights: Tensor
    indices: Tensor
    score: Tensor | Score = "softmax"
    mask: Tensor | None = None
    shape: tuple[int, ...] | None = None
    soft: bool = False
    asked: Tensor | None = None
    live: Routing | None = None
    full: bool = False

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.logits, self.weights, self.indices))

    @property
    def num_experts(self) -> int:
        """The number of experts E that the router knows, zero experts included."""
        return self.logits.shape[-1]

    @property
    def unforced(self) -> Routing:
        """The router's own decision: ``live`` if the choice was replayed, else this routing."""
        return self if self.live is None else self.live

    @property
    def scores(self) -> Tensor:
        """The scores that the selector chose by (softmax, sigmoid, ...): (N, E) with gradient, computed at each use."""
        return self.score if isinstance(self.score, Tensor) else apply_score(self.score, self.logits)

    @property
    def probs(self) -> Tensor:
        """The scores normalised to sum 1 over the experts (N, E); 0 if all scores of a token underflowed."""
        scores = self.scores
        info = torch.finfo(scores.dtype)
        return scores / scores.sum(-1, keepdim=True).clamp_min(info.tiny / info.eps)

    def real(self, values: Tensor) -> Tensor:
        """Average ``values`` (N, ...) over the real tokens; 0 if there are none."""
        if self.mask is None:
            return values.sum(0) / max(values.shape[0], 1)
        mask = self.mask.reshape(-1, *[1] * (values.dim() - 1))
        return torch.where(mask, values, 0).sum(0) / self.mask.sum().clamp_min(1)

    def counts(self) -> Tensor:
        """Count the slots that hold each expert: (E,) int64."""
        return count_slots(self.indices, self.num_experts)

    def gates(self, num_experts: int | None = None) -> Tensor:
        """Return the combine weight of every expert for every token: (N, E) with gradient, 0 if it was not chosen.

        Args:
            num_experts: how many experts are returned, from the first on; None is E.
        """
        size = self.num_experts if num_experts is None else num_experts
        dense = self.weights.new_zeros(self.weights.shape[0], size + 1)
        return dense.scatter_add(1, self._slots(size), self.weights)[:, :size]

    def members(self) -> Tensor:
        """Return whether each expert was chosen for each token: (N, E) bool."""
        size = self.num_experts
        dense = torch.zeros(self.indices.shape[0], size + 1, dtype=torch.bool, device=self.indices.device)
        return dense.scatter(1, self._slots(size), True)[:, :size]

    def _slots(self, num_experts: int) -> Tensor:
        """The expert of each slot; ``num_experts`` where there is none of them."""
        return torch.where((self.indices >= 0) & (self.indices < num_experts), self.indices, num_experts)

    def load(self) -> Tensor:
        """Return each expert's share of the load: (E,), with sum 1; 0 without a real token.

        It is the expert's share of the filled slots. In soft routing, where every expert has a slot of every token, it
        is the share of tokens for which the expert has the largest weight.
        """
        counts = self.load_counts()
        return counts.to(self.logits.dtype) / counts.sum().clamp_min(1)

    def load_counts(self) -> Tensor:
        """Return the int64 counts (E,) that ``load`` is computed from; those of several batches can be added up."""
        return count_slots(self.top_expert(), self.num_experts) if self.soft else self.counts()

    def dropped(self) -> Tensor:
        """Return the share of slots that a capacity emptied: a scalar; 0 without a capacity."""
        if self.asked is None:
            return self.logits.new_zeros(())
        return (self.asked - (self.indices >= 0).sum()) / self.asked.clamp_min(1)

    def top_expert(self) -> Tensor:
        """Return the expert with the largest weight for each token: (N,) int64, -1 for a token without experts."""
        if self.indices.shape[-1] == 0:
            return self.indices.new_full(self.indices.shape[:1], EMPTY)
        ranked = self.weights.masked_fill(self.indices < 0, -torch.inf)
        return self.indices.gather(1, ranked.argmax(-1, keepdim=True)).squeeze(1)


register_dataclass(Routing)  # so that FSDP and torch.export see the tensors inside

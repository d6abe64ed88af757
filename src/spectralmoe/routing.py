"""Routing: the value that every part of the library speaks.

Shape letters, the same in code, docstrings, docs and errors:
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
    """Softmax over the experts, or the sigmoid of each."""
    return logits.softmax(-1) if score == "softmax" else logits.sigmoid()


def count_slots(indices: Tensor, num_experts: int) -> Tensor:
    """How many slots hold each expert: (E,) int64, exact; empty slots are not counted."""
    flat = indices.reshape(-1)
    slots = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=indices.device)
    return counts.scatter_add(0, slots, torch.ones_like(slots))[:num_experts]


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router decided for N tokens.

    Attributes:
        logits: (N, E) raw scores with gradient, fp32 (float64 when the input is).
        weights: (N, K) combine weights with gradient, same precision, 0 in an empty slot.
        indices: (N, K) int64; -1 is an empty slot; an index >= ``experts.num_experts`` is a zero expert: counted, but
            it contributes nothing to the output.
        score: how ``scores`` follow from the logits, "softmax" or "sigmoid"; or the scores themselves, (N, E), where
            the selector has its own.
        mask: (N,) bool, True for a real token; None when all are.
        shape: the leading dimensions that N was flattened from.
        soft: every token uses every expert.
        asked: slots filled before a capacity emptied some, a scalar int64; None where nothing is ever dropped.
        live: of a replayed choice, what the router itself would have decided on the same logits (weights without
            gradient); else None.
        full: every slot holds an expert, which is known without a look at ``indices``: on a device a look waits.

    Iterates as ``logits, weights, indices``.

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
        """E, as the router counts them (zero experts included)."""
        return self.logits.shape[-1]

    @property
    def unforced(self) -> Routing:
        """What the router itself decides: ``live`` where the choice was replayed, else this routing."""
        return self if self.live is None else self.live

    @property
    def scores(self) -> Tensor:
        """What the selector chose from (softmax, sigmoid, ...): (N, E) with gradient; computed at each reading."""
        return self.score if isinstance(self.score, Tensor) else apply_score(self.score, self.logits)

    @property
    def probs(self) -> Tensor:
        """The scores normalised to sum 1 over the experts (N, E); 0 where all of a token underflowed."""
        scores = self.scores
        info = torch.finfo(scores.dtype)
        return scores / scores.sum(-1, keepdim=True).clamp_min(info.tiny / info.eps)

    def real(self, values: Tensor) -> Tensor:
        """``values`` (N, ...) averaged over the real tokens; 0 when there are none."""
        if self.mask is None:
            return values.sum(0) / max(values.shape[0], 1)
        mask = self.mask.reshape(-1, *[1] * (values.dim() - 1))
        return torch.where(mask, values, 0).sum(0) / self.mask.sum().clamp_min(1)

    def counts(self) -> Tensor:
        """Filled slots of real tokens for each expert: (E,) int64, exact."""
        return count_slots(self.indices, self.num_experts)

    def gates(self, num_experts: int | None = None) -> Tensor:
        """The combine weights of every expert: (N, E) with gradient, 0 for an expert that does not serve the token.

        Args:
            num_experts: of which experts, 0 to this number; None: all that the router counts.
        """
        size = self.num_experts if num_experts is None else num_experts
        dense = self.weights.new_zeros(self.weights.shape[0], size + 1)
        return dense.scatter_add(1, self._slots(size), self.weights)[:, :size]

    def members(self) -> Tensor:
        """Whether each expert serves each token: (N, E) bool."""
        size = self.num_experts
        dense = torch.zeros(self.indices.shape[0], size + 1, dtype=torch.bool, device=self.indices.device)
        return dense.scatter(1, self._slots(size), True)[:, :size]

    def _slots(self, num_experts: int) -> Tensor:
        """The expert of each slot; ``num_experts`` where there is none of them."""
        return torch.where((self.indices >= 0) & (self.indices < num_experts), self.indices, num_experts)

    def load(self) -> Tensor:
        """Share of the load that each expert carries: (E,), precise as the logits; sums to 1, 0 without a real token.

        The share of filled slots; for soft routing, where every expert fills a slot of every token, the share of
        tokens whose largest weight is this expert.
        """
        counts = self.load_counts()
        return counts.to(self.logits.dtype) / counts.sum().clamp_min(1)

    def load_counts(self) -> Tensor:
        """The int64 counts (E,) behind ``load``; those of several batches may be added up."""
        return count_slots(self.top_expert(), self.num_experts) if self.soft else self.counts()

    def dropped(self) -> Tensor:
        """Share of the slots asked for that a capacity emptied: a scalar; 0 where nothing is ever dropped."""
        if self.asked is None:
            return self.logits.new_zeros(())
        return (self.asked - (self.indices >= 0).sum()) / self.asked.clamp_min(1)

    def top_expert(self) -> Tensor:
        """The expert with the largest weight of each token: (N,) int64, -1 for a token without experts."""
        if self.indices.shape[-1] == 0:
            return self.indices.new_full(self.indices.shape[:1], EMPTY)
        ranked = self.weights.masked_fill(self.indices < 0, -torch.inf)
        return self.indices.gather(1, ranked.argmax(-1, keepdim=True)).squeeze(1)


register_dataclass(Routing)  # so that FSDP and torch.export see the tensors inside

"""Samples of the tokens of a layer: a uniform one, and the tokens with the largest combine weight of each expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectralmoe.routing import Routing

__all__ = ["BestTokens", "Place", "TokenSample"]


class TokenSample:
    """A uniform sample of all tokens given so far: those with the smallest random keys.

    >>> sample = TokenSample(3)
    >>> for part in torch.arange(20.0).reshape(4, 5, 1):
    ...     sample.add(part)
    >>> len(sample.tokens)
    3
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self._draw = size, torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0)
        self.tokens = torch.empty(0, 0)

    def add(self, tokens: Tensor) -> None:
        """Take tokens (N, D)."""
        keys = torch.rand(len(tokens), generator=self._draw)
        kept = torch.cat([self.tokens.to(tokens), tokens.detach()]) if len(self.tokens) else tokens.detach()
        keys = torch.cat([self._keys, keys])
        self._keys, first = keys.topk(min(self.size, len(keys)), largest=False)
        self.tokens = kept[first.to(kept.device)]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a token stood: in which sequence of the run, at which position, in a sequence of which length."""

    sequence: int
    position: int
    length: int


class BestTokens:
    """The places of the tokens with the largest combine weight of each expert.

    A layer that a forward calls twice has the same sequences in both calls: ``next_batch`` says when others come.
    """

    def __init__(self, num_experts: int, size: int) -> None:
        self.size, self._sequences, self._here = size, 0, 0
        self.found: list[list[tuple[float, Place]]] = [[] for _ in range(num_experts)]

    def add(self, routing: Routing) -> None:
        """Take one call."""
        e, n = len(self.found), len(routing.logits)
        sequences = routing.shape[0] if routing.shape is not None and len(routing.shape) > 1 else n
        if not n:
            return
        top = routing.gates(e).detach().T.topk(min(self.size, n), dim=1)
        length = n // sequences
        for expert, (values, rows) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
            new = [
                (value, Place(self._sequences + row // length, row % length, length))
                for value, row in zip(values, rows, strict=True)
                if value > 0
            ]
            self.found[expert] = sorted(self.found[expert] + new, key=lambda pair: -pair[0])[: self.size]
        self._here = max(self._here, sequences)

    def next_batch(self) -> None:
        """The next calls are of other sequences."""
        self._sequences, self._here = self._sequences + self._here, 0

"""A dense feed-forward network of width k H: the active compute of a token, without any choice."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from spectralmoe.bench.problem import Problem
from spectralmoe.bench.subject import Skipped, Subject
from spectralmoe.experts import FeedForward

__all__ = ["subjects"]


class Dense(nn.Module):
    """One expert on all tokens."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        sizes = problem.sizes
        with torch.device(problem.device):
            self.only = FeedForward(1, sizes.d, sizes.k * sizes.h, activation=problem.activation)
        self.only.to(problem.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.only.expert(x, 0)


def subjects(problem: Problem) -> Iterator[Subject | Skipped]:
    """The dense network."""
    layer = Dense(problem)
    note = f"one network of width {problem.sizes.k * problem.sizes.h}: another function, equal active compute"
    yield Subject("dense", layer, layer, None, "unlike", note)

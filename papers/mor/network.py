"""A small restoration network whose convolutions are linear layers on unfolded patches, and the rows put into it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.context import Rows
from spectralmoe.ranks import add_ranks
from spectralmoe.regularizers import load_balance, severity_balance
from spectralmoe.scorers import ContextScorer, Scorer
from spectralmoe.terms import Term

HIDDEN, WEIGHT = 16, 1e-2


class Unfolded(nn.Module):
    """A 3 x 3 convolution as a linear layer on the 9 C numbers around each pixel."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(9 * channels, out)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) -> (B, out, H, W)."""
        rows: Tensor = self.linear(F.unfold(x, 3, padding=1).transpose(1, 2))
        return rows.transpose(1, 2).unflatten(2, x.shape[2:])


class Restorer(nn.Module):
    """Adds what three such convolutions make of an image at half its size: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        sizes = [4 * channels, width, width, 4 * channels]
        self.convolutions = nn.ModuleList(Unfolded(*pair) for pair in pairwise(sizes))
        nn.init.zeros_(self.convolutions[-1].linear.weight)
        nn.init.zeros_(self.convolutions[-1].linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = F.pixel_unshuffle(x, 2)
        for index, convolution in enumerate(self.convolutions):
            h = convolution(h if index == 0 else F.gelu(h))
        return x + F.pixel_shuffle(h, 2)


class EqualScorer(Scorer):
    """The same logit for all: with every rank chosen, gates of one, which is a plain LoRA."""

    def forward(self, x: Tensor, *, context: Rows | None = None) -> Tensor:
        return x.new_zeros(len(x), self.num_experts)


class GroupScorer(ContextScorer):
    """A gate of groups of ranks: all ranks of a group have its logit, so a choice takes whole LoRA experts."""

    def __init__(self, dim: int, num_experts: int, *, width: int, hidden: int, each: int) -> None:
        super().__init__(dim, num_experts // each, width=width, hidden=hidden)
        self.num_experts, self.each = num_experts, each

    def forward(self, x: Tensor, *, context: Rows | None = None) -> Tensor:
        return super().forward(x, context=context).repeat_interleave(self.each, 1)


@dataclass(frozen=True, slots=True)
class Row:
    """What is added to the frozen network.

    Attributes:
        sizes: of ``add_ranks``.
        scorer: (D, E, width=P) -> scorer.
        terms: penalty terms.
        reads: what the gate gets: "estimated", "known" or "shuffled" severity.
    """

    sizes: Mapping[str, int]
    scorer: Callable[..., Scorer]
    terms: Mapping[str, Term] = field(default_factory=dict)
    reads: str = "estimated"

    def network(self, base: Restorer, width: int) -> Restorer:
        """The frozen network with its ranks; P = ``width`` numbers are read."""
        return add_ranks(copy.deepcopy(base), "*.linear", **self.sizes, scorer=partial(self.scorer, width=width))

    def strengthened(self, factor: float) -> dict[str, Term]:
        """Its terms with their weights times ``factor``."""
        return {name: Term(term.fn, factor * term.weight) for name, term in self.terms.items()}


def _equal(dim: int, num_experts: int, *, width: int) -> Scorer:
    return EqualScorer(dim, num_experts)


def by_strength(item: Any) -> Tensor:
    """``severity_balance`` by the one severity of each sample."""
    return severity_balance(item, "strength", num_real=item.layer.ranks)


def _lora(rank: int) -> Row:
    return Row({"ranks": rank, "shared": 0, "zero": 0, "k": rank}, _equal)


RANKS = {"ranks": 32, "shared": 8, "k": 8}
_GATE = partial(ContextScorer, hidden=HIDDEN)
_EVEN = {"balance": Term(load_balance, WEIGHT)}
_SEVERE = {"balance": Term(by_strength, WEIGHT)}
ROWS = {
    "lora, rank 16": _lora(16),
    "lora, rank 40": _lora(40),
    "lora-moe": Row({**RANKS, "zero": 0}, partial(GroupScorer, hidden=HIDDEN, each=4), _EVEN),
    "ranks": Row({**RANKS, "zero": 0}, _GATE, _EVEN),
    "ranks, zero experts": Row({**RANKS, "zero": 4}, _GATE, _EVEN),
    "mor": Row({**RANKS, "zero": 4}, _GATE, _SEVERE),
    "mor, shuffled": Row({**RANKS, "zero": 4}, _GATE, _SEVERE, "shuffled"),
    "mor, known": Row({**RANKS, "zero": 4}, _GATE, _SEVERE, "known"),
}

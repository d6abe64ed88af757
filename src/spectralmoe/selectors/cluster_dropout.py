"""Cluster dropout: in training some experts of each group are left out, and their tokens go to the others.

Xie et al., "MoEC: Mixture of Expert Clusters", arXiv 2207.09094, section 3. Written from the equations.
Differs: evaluation uses all experts; the draws follow from a seed that is saved with the model, so that all ranks, and
a resumed run, draw the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from spectralmoe.errors import UserError, check_whole
from spectralmoe.routing import EMPTY, Score
from spectralmoe.scrambling import scrambled
from spectralmoe.selectors.around import Around
from spectralmoe.selectors.balanced import Balanced
from spectralmoe.selectors.base import Selector
from spectralmoe.sharding import assign_

__all__ = ["ClusterDropout"]


class ClusterDropout(Around):
    r"""Wraps a selector and keeps :math:`\lfloor (1 - p)\,E/G \rfloor` experts of each of G groups in training.

    A group is E/G consecutive experts. In training the logits of the experts that are left out count as
    :math:`-\infty`, in the choice and in the scores; a slot that the wrapped selector still gives to one of them is
    emptied. In evaluation all experts take part.

    Every ``interval`` optimizer steps (``after_step`` or ``attach``) the experts are drawn anew, from a seed that
    torch's random generator gives when the router is made. ``DistributedDataParallel`` gives all ranks the same seed;
    under FSDP2 call ``torch.manual_seed`` with the same number on all ranks. A frozen router draws no more. The method
    also has a loss, ``cluster_variance``.

    Args:
        selector: the selector that chooses among the experts that take part.
        groups: G, which divides E; with 1, experts are dropped without regard to groups.
        rate: p, the share of each group that is left out, in [0, 1).
        interval: optimizer steps between two draws.

    Raises:
        UserError: groups do not divide E, the rate lies outside [0, 1) or leaves a group without experts, or interval
            is below 1. The wrapped selector is ``Balanced``, whose bias would grow without end while an expert is
            left out, or gives every token every expert.

    >>> from spectralmoe.selectors import TopK
    >>> _ = torch.manual_seed(0)
    >>> selector = ClusterDropout(TopK(1), groups=2, rate=0.5)
    >>> selector.bind(8)
    >>> selector.taking_part.view(2, 4).sum(-1).tolist()
    [2, 2]
    >>> chosen = selector.choose(torch.randn(100, 8)).flatten()
    >>> sorted(set(chosen.tolist())) == selector.taking_part.nonzero().flatten().tolist()
    True
    """

    seed: Tensor
    steps: Tensor
    taking_part: Tensor

    def __init__(self, selector: Selector, groups: int, *, rate: float = 0.5, interval: int = 250) -> None:
        super().__init__(selector)
        check_whole("ClusterDropout", "groups", groups)
        check_whole("ClusterDropout", "interval", interval)
        if not 0 <= rate < 1:
            raise UserError(f"ClusterDropout: rate must lie in [0, 1), got {rate}")
        self.groups, self.rate, self.interval = groups, rate, interval

    def bind(self, num_experts: int) -> None:
        if "seed" in self._buffers:
            raise UserError("ClusterDropout: this selector belongs to another router already; give each router its own")
        super().bind(num_experts)
        if self.soft:
            raise UserError(
                "ClusterDropout: soft routing uses all experts, so none can be left out; use TopK with k < E"
            )
        if any(isinstance(part, Balanced) for part in self.selector.modules()):
            raise UserError(
                "ClusterDropout: the bias of Balanced would run away while an expert is out; use TopK and the term "
                "load_balance"
            )
        if num_experts % self.groups:
            raise UserError(
                f"ClusterDropout: groups={self.groups} do not divide E={num_experts} experts; take a divisor"
            )
        if self._kept(num_experts) < 1:
            raise UserError(
                f"ClusterDropout: rate={self.rate} leaves none of the {num_experts // self.groups} experts of a group; "
                "lower it"
            )
        self.fills = False
        self.register_buffer("seed", torch.randint(2**62, ()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("taking_part", self._drawn(num_experts))

    def scored(self, logits: Tensor) -> Tensor | Score:
        return self.selector.scores(self._offered(logits)) if self.training else super().scored(logits)

    def ranked(self, logits: Tensor) -> Tensor:
        return super().ranked(self._offered(logits))

    def choose(self, logits: Tensor, *, mask: Tensor | None = None, context: dict[str, Any] | None = None) -> Tensor:
        return self.emptied(super().choose(self._offered(logits), mask=mask, context=context))

    def emptied(self, indices: Tensor) -> Tensor:
        """Empty, in training, the slots of experts that are out."""
        indices = super().emptied(indices)
        if not self.training:
            return indices
        return indices.masked_fill(~self.taking_part[indices.clamp_min(0)], EMPTY)

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        return super().weigh(self._offered(logits), self.emptied(indices))

    def select(self, indices: Sequence[int] | Tensor) -> Self:
        """Return a selector for these experts, with as many groups; the experts that are left out are drawn anew."""
        selector = super().select(indices)
        selector.taking_part = selector._drawn(len(selector.taking_part))
        return selector

    def after_step(self) -> None:
        super().after_step()
        self.steps += 1
        assign_(self.taking_part, self._drawn(len(self.taking_part)))

    def _offered(self, logits: Tensor) -> Tensor:
        """The logits (N, E), in training with those of experts that are out at minus infinity."""
        return logits.masked_fill(~self.taking_part, -torch.inf) if self.training else logits

    def _kept(self, num_experts: int) -> int:
        """How many experts of a group take part."""
        return int((1 - self.rate) * num_experts / self.groups + 1e-9)

    def _drawn(self, num_experts: int) -> Tensor:
        """Who takes part (E,): in each group those with the smallest of random numbers, made on the tensors' device."""
        experts = torch.arange(num_experts, device=self.seed.device)
        numbers = scrambled(scrambled(self.seed + self.steps // self.interval) + experts)
        places = numbers.view(self.groups, -1).argsort(-1).argsort(-1)
        return (places < self._kept(num_experts)).flatten()

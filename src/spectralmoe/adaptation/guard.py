"""The guard: an update may cost only so much on reference data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectralmoe.adaptation.reference import Reference, load_reference
from spectralmoe.adaptation.targets import digest_of
from spectralmoe.diagnostics.change import Change, accuracy_change
from spectralmoe.errors import UserError

__all__ = ["Guard", "Verdict"]

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an update did to the reference data.

    Attributes:
        holds: the change stays within the guard's budget and flips.
        samples: reference samples.
        reachable: how many of them the touched experts could change at all; only those were run again.
        change: accuracy after minus before in percentage points, with its 95% interval.
        flipped: samples whose prediction changed: (n,) int64.
        rerouted: samples whose route through the experts changed: (n,) int64.
        lost: protected samples that were right and are not any more.
    """

    holds: bool
    samples: int
    reachable: int
    change: Change
    flipped: Tensor
    rerouted: Tensor
    lost: int


class Guard:
    """Reference data that a one-expert update must leave (nearly) as it is.

    Args:
        loader: batches (inputs, labels); read once and kept. They must not be test or tuning data: what is reported
            on those would then be fitted to them.
        budget: how many percentage points of reference accuracy an update may cost.
        max_flips: how many reference samples may change their prediction at all; None: any number.

    Raises:
        UserError: a negative budget or number of flips; a loader without samples.

    >>> guard = Guard([(torch.rand(8, 4), torch.zeros(8))], budget=0.05, max_flips=3)
    >>> len(guard)
    8
    """

    def __init__(
        self, loader: Iterable[tuple[Tensor, Tensor]], *, budget: float = 0.1, max_flips: int | None = None
    ) -> None:
        if not budget >= 0 or (max_flips is not None and max_flips < 0):
            raise UserError(f"Guard: budget and max_flips must not be negative, got {budget} and {max_flips}")
        self.budget, self.max_flips = budget, max_flips
        self.samples, self.labels = load_reference(loader)
        self.protected: list[tuple[Tensor, Tensor]] = []
        self._measured: tuple[tuple[object, ...], Reference] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def protect(self, x: Tensor, y: Tensor) -> None:
        """Let later updates weigh these samples x (k, ...), y (k,), corrected before, among what must stay."""
        self.protected.append((x.detach().to(self.samples), y.detach().to(self.labels)))

    @torch.no_grad()
    def reference(self, model: nn.Module, head: Head, tail: nn.Module, first: str, layers: Sequence[str]) -> Reference:
        """What ``model`` does on the reference data now; measured again only when the model has changed.

        ``head`` then ``tail`` is the model, split at layer ``first``; the tokens of ``layers`` are kept.
        """
        key = (id(model), digest_of(model.state_dict()), first, len(self.protected))
        if self._measured is None or self._measured[0] != key or not set(layers) <= set(self._measured[1].tokens):
            samples = torch.cat([self.samples, *(x for x, _ in self.protected)])
            labels = torch.cat([self.labels, *(y for _, y in self.protected)])
            device = next(model.parameters()).device
            inputs = torch.cat([head(part.to(device)) for part in samples.split(1000)])
            held = len(labels) - len(self)
            self._measured = (key, Reference(tail, inputs, labels.to(device), layers, held))
        return self._measured[1]

    def judge(self, tail: nn.Module, reference: Reference, touched: dict[str, int]) -> Verdict:
        """Run the samples that the touched experts can change, and compare with what they were."""
        chosen = reference.reachable(touched)
        after, labels = reference.measure(tail, chosen), reference.labels[chosen]
        was = reference.before.logits[chosen].argmax(-1)
        now = after.logits.argmax(-1)
        step = (now == labels).int() - (was == labels).int()
        counted = chosen < len(self)
        change = accuracy_change(step[counted], len(self))
        flipped = chosen[counted & (was != now)]
        rerouted = torch.zeros_like(counted)
        for name, route in after.routes.items():
            rerouted |= (route != reference.before.routes[name][chosen]).any(-1)
        holds = change.mean >= -self.budget and (self.max_flips is None or len(flipped) <= self.max_flips)
        lost = int((~counted & (step < 0)).sum())
        moved = chosen[counted & rerouted]
        return Verdict(holds, len(self), int(counted.sum()), change, flipped.cpu(), moved.cpu(), lost)

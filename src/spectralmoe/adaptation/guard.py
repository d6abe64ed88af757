"""The guard: it limits the loss of accuracy that an update may cause on reference data."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectralmoe.adaptation.reference import BATCH, Measured, Reference, load_reference, measured
from spectralmoe.adaptation.samples import class_numbers, same_sample
from spectralmoe.adaptation.targets import digest_of, predicted
from spectralmoe.diagnostics.change import Change, accuracy_change
from spectralmoe.errors import UserError

__all__ = ["Guard", "Verdict"]

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an update did to the reference data.

    Attributes:
        holds: the change stays within the guard's budget and flips. Then it was measured by running the whole model
            on all reference samples; a refusal may rest on the reachable ones alone.
        samples: reference samples, without those that are corrected.
        reachable: how many of them the touched experts could change at all.
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
    """Bounds what a one-expert update may cost on reference data.

    On other data the cost may be larger. A sample that is itself corrected does not count among the reference data.
    They are measured again when a parameter or buffer of the model has changed; after any other change of the model
    make a new guard.

    Args:
        loader: batches (inputs, labels); read once and kept. Do not give test or tuning data: results on these would
            then be fitted to them.
        budget: how many percentage points of reference accuracy an update may cost.
        max_flips: how many reference samples may change their prediction at all; None: any number.

    Raises:
        UserError: a negative budget or number of flips; a loader without samples, or with labels that are no class
            numbers.

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
        with torch.inference_mode(False):
            self.samples, self.labels = load_reference(loader)
        self.protected: list[tuple[Tensor, Tensor]] = []
        self._measured: tuple[weakref.ref[nn.Module], tuple[object, ...], Reference] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def protect(self, x: Tensor, y: Tensor) -> None:
        """Count samples x (k, ...), y (k,) that were corrected before among the reference data of later updates."""
        with torch.inference_mode(False):
            labels = class_numbers("Guard", y.detach()).to(self.labels, copy=True)
            self.protected.append((x.detach().to(self.samples, copy=True), labels))

    def others(self, x: Tensor) -> Tensor:
        """Which reference samples are none of x (k, ...): (N,) bool.

        Raises:
            UserError: there are no others.
        """
        others = torch.ones(len(self), dtype=torch.bool)
        for sample in x:
            others &= ~same_sample(self.samples, sample)
        if not bool(others.any()):
            raise UserError("the guard's reference data hold nothing but the samples to be corrected; give it more")
        return others

    @torch.no_grad()
    def reference(self, model: nn.Module, head: Head, tail: nn.Module, first: str, layers: Sequence[str]) -> Reference:
        """What ``model`` does on the reference data now; measured again only when the model has changed.

        ``head`` then ``tail`` is the model, split at layer ``first``; the tokens of ``layers`` are kept.
        """
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        device = next(model.parameters()).device
        autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        key = (digest_of(tensors), first, len(self.protected), autocast)
        last = self._measured
        if last is None or last[0]() is not model or last[1] != key or not set(layers) <= set(last[2].tokens):
            samples, labels = self._all()
            inputs = torch.cat([head(part.to(device)) for part in samples.split(BATCH)])
            reference = Reference(tail, inputs, labels.to(device), layers, len(labels) - len(self))
            self._measured = last = (weakref.ref(model), key, reference)
        return last[2]

    @torch.no_grad()
    def judge(
        self, tail: nn.Module, reference: Reference, touched: dict[str, int], *, model: nn.Module, others: Tensor
    ) -> Verdict:
        """The verdict on ``model`` as it is now; ``reference`` is how its ``tail`` was.

        First only the samples that the touched experts can reach run through the tail, which is enough to refuse. An
        update is kept only after the whole model has run on all reference samples.

        Args:
            others: the reference samples that count (N,); see ``others``.
        """
        reachable = reference.reachable(touched)
        quick = self._compare(reference, reachable, reference.measure(tail, reachable), others, reachable)
        if not quick.holds:
            return quick
        whole = torch.arange(len(reference), device=reachable.device)
        return self._compare(reference, whole, measured(model, self._all()[0]), others, reachable)

    def _all(self) -> tuple[Tensor, Tensor]:
        """All samples and labels, the protected ones last."""
        samples = torch.cat([self.samples, *(x for x, _ in self.protected)])
        return samples, torch.cat([self.labels, *(y for _, y in self.protected)])

    def _compare(
        self, reference: Reference, chosen: Tensor, after: Measured, others: Tensor, reachable: Tensor
    ) -> Verdict:
        """The ``chosen`` samples (n,) after the update, against what all were before it."""
        labels = reference.labels[chosen]
        was, now = predicted(reference.before.logits[chosen]), predicted(after.logits)
        step = (now == labels).int() - (was == labels).int()
        protected = chosen >= len(self)
        counts = torch.cat([others, others.new_zeros(len(reference) - len(self))]).to(chosen.device)
        counted = counts[chosen]
        change = accuracy_change(step[counted], int(others.sum()))
        rerouted = torch.zeros_like(counted)
        for name, route in reference.before.routes.items():
            rerouted |= (after.routes[name] != route[chosen]).any(-1)
        flipped, moved = chosen[counted & (was != now)], chosen[counted & rerouted]
        within = bool(torch.isin(torch.cat([flipped, moved]), reachable).all())
        holds = change.mean >= -self.budget and (self.max_flips is None or len(flipped) <= self.max_flips)
        return Verdict(
            holds=holds,
            samples=int(others.sum()),
            reachable=int((counts[reachable] if within else counts).sum()),
            change=change,
            flipped=flipped.cpu(),
            rerouted=moved.cpu(),
            lost=int((protected & (step < 0)).sum()),
        )

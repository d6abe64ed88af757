"""One correction as update methods get it: the samples to correct, the weights to change, the reference data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectralmoe.adaptation.reference import Reference
from spectralmoe.adaptation.targets import Target, Weights, logits_of, right

__all__ = ["Correction", "margins"]


@dataclass(frozen=True, slots=True)
class Correction:
    """The input of an update method.

    Attributes:
        model: what runs on the samples, the whole model or its last part.
        samples: (k, ...) that must become right.  labels: (k,).
        copies: (k * m, ...) that should become right with them; may be empty.
        weights: what may be written.
        experts: the experts that these weights are, layer by layer; empty in a baseline that writes more.
        max_steps, lr: bounds of the iteration; each method says how it uses them.
        carry: share of the copies to reach.
        strength: weight of the reference samples against the samples to correct, where a method weighs the two.
        reference: samples that should stay as they are; None without a guard.
    """

    model: nn.Module
    samples: Tensor
    labels: Tensor
    copies: Tensor
    weights: Weights
    max_steps: int
    lr: float
    experts: Sequence[Target] = ()
    carry: float = 0.0
    strength: float = 1.0
    reference: Reference | None = None

    @property
    def inputs(self) -> Tensor:
        """Samples, then copies: (k + k * m, ...)."""
        return torch.cat([self.samples, self.copies]) if len(self.copies) else self.samples

    @property
    def targets(self) -> Tensor:
        """The labels of ``inputs``."""
        if not len(self.copies):
            return self.labels
        return torch.cat([self.labels, self.labels.repeat_interleave(len(self.copies) // len(self.labels))])

    def logits(self) -> Tensor:
        """Of ``inputs``, with gradient."""
        return logits_of(self.model, self.inputs)

    def solved(self, logits: Tensor) -> bool:
        """Whether all samples, and enough copies, are right."""
        solved, k = right(logits, self.targets), len(self.labels)
        return bool(solved[:k].all()) and (len(solved) == k or float(solved[k:].float().mean()) >= self.carry)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the label minus the largest other one: (B,); positive where right.

    >>> margins(torch.tensor([[1.0, 3.0], [2.0, 0.5]]), torch.tensor([0, 0]))
    tensor([-2.0000,  1.5000])
    """
    label_logit = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return (label_logit - others.amax(1, keepdim=True)).squeeze(1)

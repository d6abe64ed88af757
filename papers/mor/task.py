"""Photographs to restore with what is known of how badly they are degraded, as the training loop takes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from network import Restorer
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.context import Context
from spectralmoe.data.degradations import DEGRADATIONS, Pairs
from spectralmoe.data.photos import load_photos, patches_of
from spectralmoe.data.severity import estimate_severity
from spectralmoe.diagnostics import holds_moe
from spectralmoe.feeding import feed
from spectralmoe.training.tasks import Task
from spectralmoe.training.tasks.restoration_scores import PSNR, psnr

SIDE, THIRDS = 32, ("low", "middle", "high")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one form of the card.

    Attributes:
        train, held: patches for training, and for validation and test each.
        width: channels of the network.
        base, epochs: epochs of the network that is frozen then, and of a row.
        batch, base_rate, rate: patches a step; learning rates.
        tries, seeds: settings that each row tries, and seeds of its cells.
    """

    train: int = 512
    held: int = 240
    width: int = 32
    base: int = 6
    epochs: int = 4
    batch: int = 16
    base_rate: float = 3e-3
    rate: float = 3e-3
    tries: int = 3
    seeds: int = 5


@dataclass(frozen=True, slots=True)
class Samples:
    """Pairs of images with what a gate reads of them.

    Attributes:
        pairs: degraded images and true ones.
        severity: (N, P) of the gate.
        strength: (N,) of the balance loss.
    """

    pairs: Pairs
    severity: Tensor
    strength: Tensor

    def __getitem__(self, chosen: Any) -> Samples:
        return Samples(self.pairs[chosen], self.severity[chosen], self.strength[chosen])

    def part(self, chosen: slice, device: torch.device) -> Samples:
        """Some of the samples; the card runs on the processor alone."""
        return self[chosen]

    def shuffled(self, order: Tensor) -> Samples:
        """The same images with the severity of others."""
        return replace(self, severity=self.severity[order], strength=self.strength[order])


class Restoration(Task):
    """Patches of photographs with one of four degradations each, and the severity that the row's gate reads.

    Args:
        reads: "estimated", "shuffled" (the same over each batch, and over all held-out images) or "known" severity.
        kinds: the degradations.
    """

    name = "restore:photos"
    metrics = (PSNR,)

    def __init__(self, sizes: Sizes, reads: str = "estimated", kinds: tuple[str, ...] = tuple(DEGRADATIONS)) -> None:
        self.reads, self.parts = reads, samples(sizes, reads == "known", kinds)

    @property
    def size(self) -> int:
        return len(self.parts["train"].pairs)

    def batch(self, indices: Tensor, draw: np.random.Generator) -> Samples:
        chosen = self.parts["train"][indices]
        order = torch.from_numpy(draw.permutation(len(indices)))
        return chosen.shuffled(order) if self.reads == "shuffled" else chosen

    def as_given(self, part: str) -> Samples:
        """The samples of a part, as the row gets them."""
        found = self.parts[part]
        order = torch.randperm(len(found.pairs), generator=torch.Generator().manual_seed(0))
        return found.shuffled(order) if self.reads == "shuffled" else found

    def loss(self, model: nn.Module, batch: Samples) -> Tensor:
        return F.l1_loss(restored(model, batch).float(), batch.pairs.truths)

    def score(self, model: nn.Module, part: str) -> dict[str, float]:
        """Mean PSNR, that of each degradation, and that of the thirds by severity."""
        found = self.as_given(part)
        values = psnr(predicted(model, found), found.pairs.truths)
        severity = found.pairs.severity.amax(1)
        third = (severity * len(THIRDS)).long().clamp_max(len(THIRDS) - 1)
        groups = {name: found.pairs.kinds == place for place, name in enumerate(DEGRADATIONS)}
        groups |= {name: third == place for place, name in enumerate(THIRDS)}
        means = {f"psnr_{name}": float(values[mine].mean()) for name, mine in groups.items()}
        return {"psnr": float(values.mean()), **means}

    @classmethod
    def open(cls, *_: Any) -> Restoration:
        raise NotImplementedError("the card makes its tasks itself")

    def build(self, *_: Any) -> nn.Module:
        raise NotImplementedError("the card makes its networks itself")

    @property
    def fingerprint(self) -> str:
        return self.name

    def example(self) -> Tensor:
        return self.parts["train"].pairs.images[:1]


@cache
def samples(sizes: Sizes, known: bool, kinds: tuple[str, ...]) -> dict[str, Samples]:
    """The parts by name. Estimates get mean 0 and deviation 1 on the training part; strength is their plain mean."""
    photos = load_photos("photos")
    pairs = {}
    for seed, (part, count) in enumerate({"train": sizes.train, "validation": sizes.held, "test": sizes.held}.items()):
        pairs[part] = Pairs.of(patches_of(photos.parts[part], SIDE)[:count], kinds, seed)
    if known:
        return {part: Samples(each, each.severity, each.severity.amax(1)) for part, each in pairs.items()}
    estimates = {part: estimate_severity(each.images) for part, each in pairs.items()}
    mean, spread = estimates["train"].mean(0), estimates["train"].std(0).clamp_min(1e-3)
    return {part: Samples(pairs[part], (found - mean) / spread, found.mean(1)) for part, found in estimates.items()}


def restored(model: nn.Module, batch: Samples) -> Tensor:
    """What the network makes of a batch; its ranks are told how badly each image is degraded."""
    if not holds_moe(model):
        return model(batch.pairs.images)
    context = Context(samples={"severity": batch.severity, "strength": batch.strength})
    with feed(model, context=context):
        return model(batch.pairs.images)


@torch.no_grad()
def predicted(model: nn.Module, found: Samples) -> Tensor:
    """Restored images in [0, 1]; the network is in evaluation mode after it."""
    model.eval()
    rows = torch.arange(len(found.pairs)).split(64)
    return torch.cat([restored(model, found[chosen]) for chosen in rows]).clamp(0, 1)


def new_base(sizes: Sizes) -> Restorer:
    """The untrained network."""
    torch.manual_seed(0)
    return Restorer(1, sizes.width)

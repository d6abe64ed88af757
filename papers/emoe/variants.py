"""Part (c): what each piece of the default form is worth, and what r, K and tau do. One change at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measure import Progress, budget, build, measure
from rows import FAITHFUL_RANK, RouterFactory, Setting
from sizes import EXPERTS, Sizes
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe import EigenbasisScorer, PrincipalScorer, Router, Scorer, TopK
from spectralmoe.data.image_data import load_data
from spectralmoe.experiments.cards import Desk
from spectralmoe.linalg import qr_retraction
from spectralmoe.training.loop import train
from spectralmoe.training.tasks import ImageTask


class RandomStart(PrincipalScorer):
    """The basis starts at random directions instead of the principal ones."""

    def _start(self, covariance: Tensor) -> Tensor:
        along = (self.basis * (covariance @ self.basis)).sum(0).clamp_min(0)
        return (along / (2 * torch.pi)).sqrt().repeat_interleave(2)


class FixedBasis(PrincipalScorer):
    """The basis stays at the principal directions of the first batch."""

    is_frozen = False  # its running means go on

    def __init__(self, dim: int, num_experts: int, **options: Any) -> None:
        super().__init__(dim, num_experts, **options)
        self.basis.requires_grad_(False)


class FollowingBasis(FixedBasis):
    """The basis follows the leading eigenvectors of a running covariance, by one orthogonal iteration a step."""

    covariance: Tensor

    def __init__(self, dim: int, num_experts: int, **options: Any) -> None:
        super().__init__(dim, num_experts, **options)
        self.register_buffer("covariance", torch.zeros(dim, dim))

    def statistics(self, tokens: Tensor, counts: Tensor) -> Tensor:
        centred = tokens - self.mean
        return torch.cat([super().statistics(tokens, counts), (centred.T @ centred).flatten()])

    def update(self, statistics: Tensor) -> None:
        own, outer = statistics.split([len(statistics) - self.dim**2, self.dim**2])
        count, shift = own[0], own[1 : 1 + self.dim] / own[0]
        weight = max(1 / (int(self.updates) + 1), self.momentum)
        fresh = outer.view(self.dim, self.dim) / count - torch.outer(shift, shift)
        super().update(own)
        self.covariance.lerp_(fresh, weight).add_(torch.outer(shift, shift), alpha=weight * (1 - weight))
        self.basis.copy_(qr_retraction(self.covariance @ self.basis))


class NotWhitened(PrincipalScorer):
    """All energies are counted in one unit."""

    def update(self, statistics: Tensor) -> None:
        super().update(statistics)
        self.spread.fill_(float(self.spread.mean()))


class NotCentred(PrincipalScorer):
    """Energies around zero instead of the tokens' mean."""

    def update(self, statistics: Tensor) -> None:
        super().update(statistics)
        self.mean.zero_()


class WholeDirections(PrincipalScorer):
    """Each expert owns both sides of its directions, as in the paper's equations."""

    @property
    def owners(self) -> Tensor:
        return F.one_hot(torch.arange(2 * self.rank) // 2 % self.num_experts, self.num_experts).float()


class LearnedMasks(PrincipalScorer):
    """Which expert a side speaks for is learned, starting near the fixed owners."""

    def __init__(self, dim: int, num_experts: int, **options: Any) -> None:
        super().__init__(dim, num_experts, **options)
        self.mask_logits = nn.Parameter(4 * self.owners)

    def forward(self, x: Tensor, *, context: dict[str, Any] | None = None) -> Tensor:
        return self.energies(x) @ self.mask_logits.softmax(-1) / self.temperature


@dataclass(frozen=True, slots=True)
class Variant:
    """A network of part (c): its scorer, top-k, and number of experts."""

    scorer: Callable[[int, int], Scorer]
    k: int = 1
    experts: int = EXPERTS

    @property
    def router(self) -> RouterFactory:
        """(D, E) -> router."""
        return lambda dim, experts: Router(self.scorer(dim, experts), TopK(self.k))


def _with(cls: type[Scorer] = PrincipalScorer, **options: Any) -> Callable[[int, int], Scorer]:
    return lambda dim, experts: cls(dim, experts, **options)


VARIANTS: dict[str, Variant] = {
    "EMoE": Variant(_with()),
    "random start": Variant(_with(RandomStart)),
    "basis fixed after the start": Variant(_with(FixedBasis)),
    "basis follows the covariance": Variant(_with(FollowingBasis)),
    "not whitened": Variant(_with(NotWhitened)),
    "not centred": Variant(_with(NotCentred)),
    "whole directions, r = E": Variant(_with(WholeDirections, rank=EXPERTS)),
    "learned masks": Variant(_with(LearnedMasks)),
    "faster statistics, momentum 0.1": Variant(_with(momentum=0.1)),
    "r = E": Variant(_with(rank=EXPERTS)),
    "r = 2E": Variant(_with(rank=2 * EXPERTS)),
    "r = 4E": Variant(_with(rank=4 * EXPERTS)),
    "tau = 0.1": Variant(_with(temperature=0.1)),
    "tau = 0.4": Variant(_with(temperature=0.4)),
    "tau = 1": Variant(_with(temperature=1.0)),
    "K = 4": Variant(_with(), experts=4),
    "K = 16": Variant(_with(), experts=16),
    "top-2": Variant(_with(), k=2),
    "faithful": Variant(_with(EigenbasisScorer, rank=FAITHFUL_RANK)),
    "faithful, tau = 0.1": Variant(_with(EigenbasisScorer, rank=FAITHFUL_RANK, temperature=0.1)),
    "faithful, r = E": Variant(_with(EigenbasisScorer, rank=EXPERTS)),
}


def run_variant(cell: Any, desk: Desk, progress: Progress, *, sizes: Sizes) -> dict[str, Any]:
    """One cell of ablations.json, on validation data."""
    torch.set_num_threads(1)
    data = load_data(sizes.dataset).subset(sizes.ablation_size)
    variant, lr = VARIANTS[cell["variant"]], Setting(*desk.tuned["tuning"]["EMoE"]["setting"]).lr
    model = build(variant.router, data, cell["seed"], variant.experts)
    train(model, ImageTask(data), budget(lr, sizes.ablation_epochs, cell["seed"]))
    part = data.validation
    return {"experts": variant.experts, **measure(model, part.images, part.labels)}

"""The networks of the card: one layer of experts on the pixels of digits, trained on labels that are partly wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe import Balanced, FeedForward, LinearScorer, MoE, Router, Soft, TopK, attach, param_groups
from spectralmoe.data.image_data import ImageData, Split

__all__ = ["ROWS", "Budget", "accuracy_under_noise", "effective_experts", "make_network", "train_network", "with_noise"]

ROWS = ("learned", "frozen", "dense")


@dataclass(frozen=True, slots=True)
class Budget:
    """What all networks share: H, steps over the whole training part, and the share of wrong labels."""

    hidden: int = 16
    steps: int = 200
    wrong: float = 0.2


class Digits(nn.Module):
    """Pixels x (N, D) -> x + experts(x) -> LayerNorm -> class logits (N, C).

    Without x the norm would take the only weight of a token with one expert out again, and its router would learn
    nothing from the task.
    """

    def __init__(self, experts: nn.Module, dim: int, classes: int) -> None:
        super().__init__()
        self.experts, self.norm, self.head = experts, nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x + self.experts(x)))
        return logits


def make_network(row: str, experts: int, k: int, budget: Budget, dim: int, classes: int) -> Digits:
    """The network of a row: K of E experts by a router that learns or was fixed before, or all parameters at once."""
    if row == "dense":
        width = experts * budget.hidden
        return Digits(nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, dim)), dim, classes)
    learned = Balanced(k, score="softmax", normalize=False, rate=1e-2)
    selector = Soft() if k == experts else learned if row == "learned" else TopK(k)
    router = Router(LinearScorer(dim, experts), selector)
    if row == "frozen":
        router.requires_grad_(False)
    bank = FeedForward(experts, dim, budget.hidden, activation="relu", bias=True)
    return Digits(MoE(router, bank), dim, classes)


def train_network(network: Digits, x: Tensor, labels: Tensor, budget: Budget, lr: float) -> None:
    """AdamW over the whole training part, the learning rate falling to zero."""
    optimizer = torch.optim.AdamW(param_groups(network, 0.0), lr=lr)
    if isinstance(network.experts, MoE):
        attach(optimizer, network)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.steps)
    for _ in range(budget.steps):
        optimizer.zero_grad()
        F.cross_entropy(network(x), labels).backward()
        optimizer.step()
        schedule.step()
    network.eval()


def with_noise(labels: Tensor, classes: int, wrong: float, seed: int) -> Tensor:
    """The labels, exactly a share ``wrong`` of them replaced by another class."""
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=draw)[: round(wrong * len(labels))]
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + torch.randint(1, classes, chosen.shape, generator=draw)) % classes
    return noisy


def accuracy_under_noise(right: float, classes: int, wrong: float) -> float:
    """The expected share of labels with such noise that predictions hit which are ``right`` on clean ones.

    >>> accuracy_under_noise(1.0, 10, 0.2), round(accuracy_under_noise(0.1, 10, 0.2), 3)
    (0.8, 0.1)
    """
    return (1 - wrong) * right + wrong * (1 - right) / (classes - 1)


@torch.no_grad()
def share_right(network: Digits, x: Tensor, labels: Tensor) -> float:
    """Share of samples whose class is right."""
    return float((network(x).argmax(-1) == labels).float().mean())


@torch.no_grad()
def effective_experts(network: Digits, x: Tensor) -> float:
    """exp of the entropy of the load; 1 for a network without choice."""
    layer: Any = network.experts
    if not isinstance(layer, MoE):
        return 1.0
    load = layer.router(x).load()
    return float(torch.special.entr(load).sum().exp())


def pixels(split: Split, data: ImageData) -> Tensor:
    """Images as rows (N, D), centred and scaled by the whole training part."""
    train = data.train.images
    return ((split.images - train.mean()) / train.std()).flatten(1)

"""The networks of the card, heads of equal parameters on fixed features, and what an expert does to each class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe import LinearScorer, MoE, Router
from spectralmoe.data.image_data import ImageData, Split
from spectralmoe.experts import MultilinearExperts
from spectralmoe.selectors import Entmax

__all__ = [
    "ROWS",
    "Budget",
    "class_changes",
    "features",
    "information",
    "make_head",
    "polysemanticity",
    "rank_for",
    "train_body",
    "train_head",
]

ROWS = ("softmax", "entmax", "entmax, tr", "entmax, frozen gate", "dense")
BOND = 4


@dataclass(frozen=True, slots=True)
class Budget:
    """What all heads share.

    Attributes:
        width: features of the body.
        parameters: of a head, gate included, as near below as whole ranks come.
        body_steps, steps: of the body, which then stays as it is, and of the head.
        batch: samples a step.
    """

    width: int = 64
    parameters: int = 24_000
    body_steps: int = 150
    steps: int = 300
    batch: int = 250


def rank_for(form: str, experts: int, budget: Budget, classes: int) -> int:
    """The largest rank whose bank and gate stay within the budget.

    >>> rank_for("cp", 256, Budget(), 10), rank_for("cp", 4, Budget(), 10), rank_for("tr", 256, Budget(), 10)
    (23, 300, 11)
    """
    left = budget.parameters - experts * budget.width
    if form == "cp":
        return left // (experts + budget.width + 1 + classes)
    return (left - experts * BOND**2) // (BOND * (budget.width + 1 + classes))


def make_head(row: str, experts: int, budget: Budget, classes: int) -> nn.Module:
    """The head of a row: one layer of linear experts under a soft gate, or a plain network of two layers."""
    if row == "dense":
        hidden = budget.parameters // (budget.width + 1 + classes)
        return nn.Sequential(nn.Linear(budget.width, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    router = Router(LinearScorer(budget.width, experts), Entmax(1.0 if row == "softmax" else 1.5, norm=True))
    if row == "entmax, frozen gate":
        router.requires_grad_(False)
    else:
        nn.init.zeros_(router.scorer.weight)  # type: ignore[arg-type]
    form: Any = "tr" if row == "entmax, tr" else "cp"
    rank = rank_for(form, experts, budget, classes)
    return MoE(router, MultilinearExperts(experts, budget.width, rank=rank, form=form, bond=BOND, out=classes))


def train_body(data: ImageData, budget: Budget, seed: int) -> nn.Module:
    """Pixels (N, 784) -> features (N, 64), trained under a linear head that is thrown away."""
    torch.manual_seed(seed)
    pixels = data.train.images.flatten(1)
    body = nn.Sequential(nn.Linear(pixels.shape[1], budget.width), nn.ReLU())
    head = nn.Linear(budget.width, data.num_classes)
    train_head(nn.Sequential(body, head), pixels, data.train.labels, budget, budget.body_steps, 1e-3, seed)
    return body


@torch.no_grad()
def features(body: nn.Module, split: Split, data: ImageData) -> Tensor:
    """Features of a part, centred and scaled by those of the training part."""
    train = body(data.train.images.flatten(1))
    scaled: Tensor = (body(split.images.flatten(1)) - train.mean(0)) / (train.std(0) + 1e-3)
    return scaled


def train_head(head: nn.Module, x: Tensor, labels: Tensor, budget: Budget, steps: int, lr: float, seed: int) -> None:
    """Adam on batches that are drawn, the learning rate falling to zero."""
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(x), (min(budget.batch, len(x)),), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(head(x[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def class_changes(bank: MultilinearExperts, x: Tensor, gates: Tensor, labels: Tensor, classes: int) -> Tensor:
    """By how much the log-probability of the true class falls when a gate is set to 0, mean over each class: (E, C)."""
    logits = bank.mix(x, gates)
    whole, rows = _true(logits, labels), F.one_hot(labels, classes).to(x.dtype)
    share = rows / rows.sum(0).clamp_min(1)
    falls = []
    for e in range(bank.num_experts):
        without = logits - gates[:, e : e + 1] * bank.expert(x, e)
        falls.append((whole - _true(without, labels)) @ share)
    return torch.stack(falls)


def polysemanticity(changes: Tensor) -> float:
    r"""Distance of :math:`|d| / \|d\|` from the nearest unit vector: 0 where an expert matters to one class alone.

    Mean over the experts, each as heavy as its vector is long, so that experts which do nothing say nothing.

    >>> polysemanticity(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
    0.0
    """
    length = changes.norm(dim=1)
    nearest = changes.abs().amax(1) / length.clamp_min(1e-30)
    each = (2 - 2 * nearest).clamp_min(0).sqrt()
    return float((each * length).sum() / length.sum().clamp_min(1e-30))


def information(gates: Tensor, labels: Tensor, classes: int) -> float:
    """Mutual information of expert and class under the gates' mass, over the entropy of the class.

    >>> information(torch.eye(2), torch.tensor([0, 1]), 2)
    1.0
    """
    joint = gates.double().T @ F.one_hot(labels, classes).double()
    joint = joint / joint.sum()
    entropies = [torch.special.entr(p).sum() for p in (joint.sum(1), joint.sum(0), joint)]
    return float((entropies[0] + entropies[1] - entropies[2]) / entropies[1])


def _true(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)

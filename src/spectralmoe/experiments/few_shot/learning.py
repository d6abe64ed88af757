"""Few-shot learning: MoE parts and a head trained on k images a class, the backbone frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from spectralmoe.data.image_data import ImageData, Split
from spectralmoe.diagnostics import evaluate
from spectralmoe.errors import UserError
from spectralmoe.terms import Term
from spectralmoe.training.loop import train as run_training
from spectralmoe.training.settings import Optimization
from spectralmoe.training.tasks import ImageTask
from spectralmoe.vision import BranchSpec, add_branches
from spectralmoe.vision.model import VisionMoE

__all__ = ["FEW_SHOT", "draw_shots", "few_shot", "few_shot_network"]

FEW_SHOT = Optimization(epochs=200, batch_size=32, lr=5e-3, weight_decay=1e-2)
"""How all rows are trained; see docs/vision.md for where the values come from."""


def draw_shots(split: Split, shots: int, num_classes: int, seed: int) -> Split:
    """``shots`` images of each class, drawn with ``seed`` alone; under one seed fewer shots are a subset of more.

    Raises:
        UserError: a class with fewer images.

    >>> from spectralmoe.data.image_data import load_data
    >>> draw_shots(load_data("digits").train, 3, 10, seed=0).labels.bincount().tolist()
    [3, 3, 3, 3, 3, 3, 3, 3, 3, 3]
    """
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in range(num_classes):
        members = order[split.labels[order] == label][:shots]
        if len(members) < shots:
            raise UserError(f"{shots} shots were asked for, but class number {label} has {len(members)} images")
        chosen.append(members)
    index = torch.stack(chosen, 1).flatten()
    return Split(split.images[index], split.labels[index])


def few_shot_network(
    model: VisionMoE,
    spec: BranchSpec | None,
    train: Split,
    num_classes: int,
    *,
    settings: Optimization = FEW_SHOT,
    terms: Mapping[str, Term] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    own: bool = False,
    progress: Callable[[float], None] | None = None,
) -> VisionMoE:
    """A copy of ``model`` with a fresh head, and fresh branches if there is a ``spec``, trained on ``train``.

    Everything else stays as it is, bit by bit. Under one seed (``settings.seed``) all specs start with the same head.

    Args:
        terms: penalty terms.
        optimizer: what the row says of it, see ``make_optimizer``.
        own: train the MoE parts that ``model`` has; otherwise they are frozen like the rest.

    Raises:
        UserError: a block that has a branch already; what ``spec`` refuses; training that diverges.
    """
    network = copy.deepcopy(model)
    parts = tuple(network.parts())
    torch.manual_seed(settings.seed)
    network.new_head(num_classes)
    if spec is not None:
        add_branches(network.backbone, spec)
    network.freeze([path for path in network.parts() if own or path not in parts])
    empty = Split(train.images[:0], train.labels[:0])
    data = ImageData("shots", train, empty, empty, tuple(map(str, range(num_classes))))
    run_training(network, ImageTask(data), settings, terms=terms, optimizer=optimizer, progress=progress)
    return network


def few_shot(
    model: VisionMoE,
    spec: BranchSpec | None,
    train: Split,
    test: Split,
    num_classes: int,
    *,
    settings: Optimization = FEW_SHOT,
    terms: Mapping[str, Term] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    own: bool = False,
    progress: Callable[[float], None] | None = None,
) -> float:
    """Accuracy in percent on ``test`` of ``few_shot_network``, whose arguments and errors these are.

    With ``spec=None`` it is a linear probe: the head alone is trained.
    """
    network = few_shot_network(
        model, spec, train, num_classes, settings=settings, terms=terms, optimizer=optimizer, own=own, progress=progress
    )
    return evaluate(network, test.images, test.labels).accuracy

"""What the card measures beside the test part's accuracy: fit to the training images, and how alike siblings are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rows import SIBLINGS
from torch import Tensor
from torch.nn import functional as F

from spectralmoe import record
from spectralmoe.diagnostics.evaluation import run_over
from spectralmoe.experiments.cards import Trained
from spectralmoe.training.tasks import ImageTask
from spectralmoe.training.tasks.classification import class_scores

__all__ = ["by_size", "likeness", "measure", "with_gap"]

_IMAGES = 1_000


def measure(trained: Trained) -> dict[str, Any]:
    """Accuracy on the training images, and the likeness of siblings and of others, mean over layers."""
    network, task = trained.network, trained.task
    if not isinstance(task, ImageTask):
        raise TypeError(f"the card's data are images, not those of a {type(task).__name__}")
    images, labels = task.data.train.images, task.data.train.labels
    fitted = class_scores(run_over(network, images), labels)["accuracy"]
    with torch.no_grad(), record(network.eval()) as tape:
        network(task.data.test.images[:_IMAGES])
    alike = torch.tensor([likeness(item.routing.probs) for item in tape]).mean(0).tolist()
    return {"train_accuracy": fitted, "siblings": alike[0], "others": alike[1]}


def likeness(scores: Tensor) -> tuple[float, float]:
    """Mean cosine of two experts' scores (N, E) over the tokens: of siblings, and of experts of two groups."""
    profiles = F.normalize(scores.double(), dim=0)
    cosines, groups = profiles.T @ profiles, torch.arange(scores.shape[1]) // SIBLINGS
    together = groups[:, None] == groups
    itself = torch.eye(len(groups), dtype=torch.bool)
    return float(cosines[together & ~itself].mean()), float(cosines[~together].mean())


def with_gap(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The cells, each with its accuracy on the training images less that on the test part."""
    return [
        {**cell, "gap": cell["train_accuracy"] - cell["accuracy"]} if "accuracy" in cell else {**cell} for cell in cells
    ]


def by_size(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One cell for each row, seed and processor: what the largest number of experts adds to the accuracy of the
    smallest, and log2 of the number that is best."""
    joined: dict[tuple[Any, ...], dict[int, float]] = {}
    for cell in cells:
        if "accuracy" in cell:
            joined.setdefault((cell["row"], cell["seed"], cell["cpu"]), {})[cell["experts"]] = cell["accuracy"]
    few, many = min(cell["experts"] for cell in cells), max(cell["experts"] for cell in cells)
    return [
        {
            "row": row,
            "seed": seed,
            "cpu": cpu,
            "growth": reached[many] - reached[few],
            "best": math.log2(max(reached, key=lambda number: reached[number])),
        }
        for (row, seed, cpu), reached in joined.items()
        if {few, many} <= reached.keys()
    ]

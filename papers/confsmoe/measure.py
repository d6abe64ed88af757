"""What the card measures beside accuracy: how even the experts are used, and whether their confidence is right."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spectralmoe import record
from spectralmoe.data.views import VIEWS
from spectralmoe.diagnostics.evaluation import Counted, evaluation_mode
from spectralmoe.experiments.cards import Trained
from spectralmoe.experts import ConfidentExperts
from spectralmoe.models import ViewsMoE
from spectralmoe.training.tasks import ViewsTask

__all__ = ["correlation", "measure", "usage_entropy"]


def measure(trained: Trained) -> dict[str, Any]:
    """Entropy of the load over log E in the layer where it is smallest; of a network with confidence, also how that
    goes with whether the expert alone is right, and its distance to the share that is, over all test rows."""
    network, task = trained.network, trained.task
    if not (isinstance(task, ViewsTask) and isinstance(network, ViewsMoE)):
        raise TypeError(f"the card's networks have several views, not those of a {type(task).__name__}")
    counted = Counted(network)
    task.score(counted, "test")
    values: dict[str, Any] = {"usage": min(map(usage_entropy, counted.loads.values()))}
    if not isinstance(network.blocks[0].moe.experts, ConfidentExperts):
        return values
    labels = task.data.test.labels.repeat(len(task.views.rates)).repeat_interleave(len(VIEWS))
    with torch.no_grad(), evaluation_mode(network), record(network, keep=("confidence", "unweighed")) as tape:
        network(task.inputs("test"))
        said = [item.tensor("confidence") for item in tape]
        right = [
            network.head(item.tensor("unweighed")).argmax(-1) == labels[item.order // item.routing.indices.shape[1]]
            for item in tape
        ]
    confidence, correct = torch.cat(said).double(), torch.cat(right).double()
    return values | {
        "correlation": correlation(confidence, correct),
        "over": float(confidence.mean() - correct.mean()),
        "alone": float(correct.mean()),
    }


def usage_entropy(load: Tensor) -> float:
    """Entropy of a load (E,) over log E: 1 where all experts are used alike, 0 where one is."""
    return float(-load.double().xlogy(load.double()).sum() / math.log(len(load)))


def correlation(x: Tensor, y: Tensor) -> float | None:
    """Pearson's correlation of two vectors; None where one does not vary."""
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size > 0 else None

"""Which experts get images of which degradation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectralmoe.data.degradations import KINDS
from spectralmoe.diagnostics.association import label_table
from spectralmoe.errors import UserError
from spectralmoe.recorder import record
from spectralmoe.training.tasks import RestorationTask, Task

__all__ = ["experts_of_kinds", "told_by_experts"]


def experts_of_kinds(network: nn.Module, task: Task) -> Tensor:
    """How many test images of each of ``KINDS`` went to each expert: (kinds, E) int64, over layers of whole samples.

    Raises:
        UserError: a task of another kind.
    """
    if not isinstance(task, RestorationTask):
        raise UserError(f"experts_of_kinds: {task.name!r} are no photographs to restore")
    pairs = task.parts["test"]
    with record(network) as tape:
        task.restored(network, pairs)
    layers: dict[str, int] = {}
    table = torch.zeros((), dtype=torch.int64)
    for item in tape:
        start = layers.get(item.name, 0)
        layers[item.name] = end = start + len(item.routing.logits)
        table = table + label_table(item.routing, pairs.kinds[start:end], len(KINDS))
    return table


def told_by_experts(table: Tensor) -> float:
    r"""The uncertainty coefficient of the kind given the expert: :math:`1 - H(kind | expert) / H(kind)`.

    From counts (kinds, E). At 0 the expert tells nothing about the kind, as where all images go to one expert; at 1 it
    tells everything. ``diagnostics.mutual_information`` differs in two ways: it divides the mutual information by the
    smaller of the two entropies, not by H(kind), and it corrects the entropies for the number of counts.

    >>> told_by_experts(torch.tensor([[5, 0, 0], [0, 3, 2]])), told_by_experts(torch.tensor([[5, 0], [5, 0]]))
    (1.0, 0.0)
    """
    shares = table.double() / table.sum().clamp_min(1)
    whole, experts, kinds = (float(-torch.xlogy(part, part).sum()) for part in (shares, shares.sum(0), shares.sum(1)))
    return max(0.0, 1 - (whole - experts) / kinds) if kinds else 0.0

"""Evaluation of a classifier on labelled inputs: accuracy, predictions and the load of its experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectralmoe.layers import moe_layers
from spectralmoe.recording import Recordable
from spectralmoe.tape import Tape

__all__ = ["Counted", "Evaluation", "evaluate", "evaluation_mode", "holds_moe", "run_over"]

_BATCH, _NUMBERS = 1000, 2**24


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results of one pass over labelled inputs.

    Attributes:
        accuracy: the accuracy in percent.
        predictions: the predicted classes (N,) int64, on the CPU.
        loads: layer name -> each expert's share of the load (E,); empty for a model without MoE layers.
    """

    accuracy: float
    predictions: Tensor
    loads: dict[str, Tensor]


class Counted(nn.Module):
    """Wraps a model and sums the load of its experts over all forwards; it computes what the model computes.

    >>> from spectralmoe.models import sr_moe
    >>> counted = Counted(sr_moe(10, channels=1))
    >>> counted(torch.rand(2, 1, 8, 8)).shape, {name: float(load.sum()) for name, load in counted.loads.items()}
    (torch.Size([2, 10]), {'stages.0.moe': 1.0, 'stages.1.moe': 1.0})
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.counts = model, dict[str, Tensor]()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with Tape(moe_layers(self.model)) if holds_moe(self.model) else nullcontext(()) as tape:
            result = self.model(*args, **kwargs)
        for item in tape:
            self.counts[item.name] = self.counts.get(item.name, 0) + item.routing.load_counts().cpu()
        return result

    @property
    def loads(self) -> dict[str, Tensor]:
        """Layer name -> each expert's share of the load (E,); empty for a model without MoE layers."""
        return {name: total / total.sum().clamp_min(1) for name, total in self.counts.items()}


@torch.no_grad()
def run_over(model: nn.Module, inputs: Tensor, **beside: Tensor) -> Tensor:
    """Run ``model`` on ``inputs`` (N, ...) in batches, in evaluation mode, and return its outputs on the CPU.

    Args:
        beside: further inputs (N, ...), which the model takes by keyword.
    """
    device, size = next(model.parameters()).device, min(_BATCH, _NUMBERS // max(inputs[:1].numel(), 1) + 1)
    rows = {name: values.split(size) for name, values in beside.items()}
    made = []
    with evaluation_mode(model):
        for number, part in enumerate(inputs.split(size)):
            more = {name: parts[number].to(device) for name, parts in rows.items()}
            made.append(model(part.to(device), **more).cpu())
    return torch.cat(made)


def evaluate(model: nn.Module, inputs: Tensor, labels: Tensor) -> Evaluation:
    """Evaluate a classifier on ``inputs`` (N, ...) with ``labels`` (N,), in evaluation mode; its mode is restored.

    >>> from spectralmoe.models import sr_moe
    >>> result = evaluate(sr_moe(10, channels=1), torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))
    >>> 0 <= result.accuracy <= 100, result.predictions.shape
    (True, torch.Size([4]))
    """
    counted = Counted(model)
    predictions = run_over(counted, inputs).argmax(-1)
    return Evaluation(100 * float((predictions == labels).float().mean()), predictions, counted.loads)


def holds_moe(model: nn.Module) -> bool:
    """Return whether ``model`` holds an MoE layer of this library."""
    return any(isinstance(module, Recordable) for module in model.modules())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode inside a ``with`` block; after it each module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

"""Accuracy, predictions and expert load of a classifier on labelled inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectralmoe.recording import Recordable
from spectralmoe.tape import record

__all__ = ["Evaluation", "evaluate", "evaluation_mode", "holds_moe"]

_BATCH, _NUMBERS = 1000, 2**24


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one pass over labelled inputs showed.

    Attributes:
        accuracy: percent.
        predictions: (N,) int64, on the CPU.
        loads: layer name -> share of the load of each expert (E,); empty for a model without MoE layers.
    """

    accuracy: float
    predictions: Tensor
    loads: dict[str, Tensor]


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, labels: Tensor) -> Evaluation:
    """Run ``model`` over ``inputs`` (N, ...) with ``labels`` (N,) in evaluation mode; its mode is put back."""
    device, routed = next(model.parameters()).device, holds_moe(model)
    predictions, counts = [], dict[str, Tensor]()
    with evaluation_mode(model):
        for part in inputs.split(min(_BATCH, _NUMBERS // max(inputs[:1].numel(), 1) + 1)):
            with record(model) if routed else nullcontext(()) as tape:
                predictions.append(model(part.to(device)).argmax(-1).cpu())
            for item in tape:
                counts[item.name] = counts.get(item.name, 0) + item.routing.load_counts().cpu()
    found = torch.cat(predictions)
    loads = {name: total / total.sum().clamp_min(1) for name, total in counts.items()}
    return Evaluation(100 * float((found == labels).float().mean()), found, loads)


def holds_moe(model: nn.Module) -> bool:
    """Whether there is an MoE layer in ``model``."""
    return any(isinstance(module, Recordable) for module in model.modules())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` inside the block; each module's own mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

"""The layers before the first trained one run once: their output is the input of the rest in every epoch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spectralmoe.errors import UserError
from spectralmoe.hf.training.text_windows import Windows

__all__ = ["after_prefix", "check_prefix", "without_prefix"]


class _Skipped(nn.Module):
    """Takes the place of a frozen layer and returns its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, value in vars(layer).items():  # what a model asks of its layers, such as attention_type
            if not name.startswith("_") and not isinstance(value, Tensor | nn.Module):
                setattr(self, name, value)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class _Reached(Exception):
    """Raised when a layer is reached, with its hidden states, so that the later layers need not run."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


@torch.no_grad()
def after_prefix(model: nn.Module, layers: nn.ModuleList, first: int, windows: Windows, rows: int) -> Windows:
    """The windows with the hidden states (W, L, D) that layer ``first`` reads, in place of token ids.

    The layers before it run in evaluation mode.

    Args:
        layers: the decoder layers of ``model``.
        rows: windows of a batch.
    """

    def reached(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    was_training, device = model.training, next(model.parameters()).device
    handle = layers[first].register_forward_pre_hook(reached, with_kwargs=True)
    model.eval()
    hidden: list[Tensor] = []
    try:
        for ids in windows.inputs.split(rows):
            try:
                model(input_ids=ids.to(device), use_cache=False)
            except _Reached as stop:
                hidden.append(stop.hidden.cpu())
    finally:
        handle.remove()
        model.train(was_training)
    return replace(windows, inputs=torch.cat(hidden)) if hidden else windows


@contextmanager
def without_prefix(layers: nn.ModuleList, first: int) -> Iterator[None]:
    """Inside the block the model takes what layer ``first`` reads as ``inputs_embeds``, and runs from there on.

    The layers before it are out of the model, with their parameters; numbers and names of the others stay. They are
    put back when the block ends.

    Args:
        layers: the decoder layers of the model.
    """
    before = list(layers[:first])
    for place, layer in enumerate(before):
        layers[place] = _Skipped(layer)
    try:
        yield
    finally:
        for place, layer in enumerate(before):
            layers[place] = layer


@torch.no_grad()
def check_prefix(model: nn.Module, layers: nn.ModuleList, first: int, windows: Windows) -> None:
    """Check that the model gives the same logits with and without the prefix, on the first of the ``windows``.

    Raises:
        UserError: the logits differ, as in a family that scales what it takes for embeddings.
    """
    one = Windows(windows.inputs[:1], windows.labels[:1])
    cached = after_prefix(model, layers, first, one, 1)
    device = next(model.parameters()).device
    whole = model(input_ids=one.inputs.to(device), use_cache=False).logits
    with without_prefix(layers, first):
        late = model(inputs_embeds=cached.inputs.to(device), use_cache=False).logits
    if not torch.allclose(late, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
        raise UserError(
            f"the late layers of a {type(model).__name__} cannot be trained behind stored hidden states: it changes "
            "what it takes for embeddings; train all layers"
        )

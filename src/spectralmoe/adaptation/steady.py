"""Puts a model into the state in which it is corrected and measured: every run gives the same outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from spectralmoe.adaptation.targets import logits_of, refuse_inference
from spectralmoe.diagnostics import evaluation_mode
from spectralmoe.errors import UserError

__all__ = ["first_logits", "steady"]


@contextmanager
def steady(model: nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode and without gradient inside the block; modes are put back after it.

    An outer ``torch.inference_mode`` is switched off inside, because methods need gradients. An outer autocast goes on,
    without its cache of weights, which would not follow what is written.

    Raises:
        UserError: a module that stays in training mode, or weights made under ``torch.inference_mode``.
    """
    refuse_inference(model.parameters(), "the model")
    refuse_inference(model.buffers(), "the model")
    kind = next(model.parameters()).device.type
    uncached = (
        torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)
        if torch.is_autocast_enabled(kind)
        else nullcontext()
    )
    with torch.inference_mode(False), torch.no_grad(), evaluation_mode(model), uncached:
        training = [name or type(module).__name__ for name, module in model.named_modules() if module.training]
        if training:
            raise UserError(
                f"module {training[0]!r} stays in training mode after model.eval(), where a model does not always "
                "answer alike; let its train() pass the mode on"
            )
        yield


def first_logits(model: nn.Module, x: Tensor) -> Tensor:
    """The class logits of ``x``, from a run that is checked for random numbers and changed buffers.

    Raises:
        UserError: the run drew random numbers, or changed a buffer (which is put back).
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    random = _random_state(x)
    logits = logits_of(model, x)
    changed = [name for name, buffer in model.named_buffers() if not _same_bits(buffer, buffers[name])]
    for name in changed:
        model.get_buffer(name).copy_(buffers[name])
    if changed:
        raise UserError(
            f"buffer {changed[0]!r} changes in evaluation mode, so the model does not always answer alike; change "
            "it in training mode alone"
        )
    if any(not torch.equal(before, now) for before, now in zip(random, _random_state(x), strict=True)):
        raise UserError(
            "the model draws random numbers in evaluation mode, so it does not always answer alike; "
            "F.dropout needs training=self.training"
        )
    return logits


def _random_state(x: Tensor) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(x.device)] if x.is_cuda else [])]


def _same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.contiguous().flatten().view(torch.uint8), y.contiguous().flatten().view(torch.uint8))

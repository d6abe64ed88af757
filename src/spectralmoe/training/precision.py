"""The precision of a training step: autocast for its forward, and under fp16 a scaled loss, since gradients vanish."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from spectralmoe.errors import UserError

__all__ = ["Precision", "autocast", "loss_scaler"]

Precision = Literal["fp32", "bf16", "fp16"]
"""fp16 needs CUDA. Weights, routers and the loss stay fp32 in all three."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context of the forward.

    Raises:
        UserError: fp16 without CUDA.
    """
    _check(precision, device)
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=_DTYPES[precision])


def loss_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """A scaler of the loss under fp16; it does nothing otherwise.

    Raises:
        UserError: fp16 without CUDA.
    """
    _check(precision, device)
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def _check(precision: Precision, device: torch.device) -> None:
    if precision == "fp16" and device.type != "cuda":
        raise UserError('precision = "fp16" needs a CUDA device; use "bf16" or "fp32"')

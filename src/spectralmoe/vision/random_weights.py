"""A module is known by what it computes under random weights, not by its names."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

__all__ = ["with_random_weights"]

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def with_random_weights(module: Module) -> tuple[Module, torch.Generator]:
    """A copy of ``module`` on the CPU in fp32, whose rows of weights have about the length 1, and what drew them.

    The generator is its own, so the caller's random numbers stay as they are.
    """
    draw = torch.Generator().manual_seed(0)
    trial = copy.deepcopy(module).cpu().float()
    for parameter in trial.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw) / parameter.shape[1:].numel() ** 0.5)
    return trial, draw

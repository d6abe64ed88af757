"""Optimizers that treat all parameters alike: AdamW and SGD with momentum."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from spectralmoe.steps import param_groups

__all__ = ["Rates", "adamw", "sgd"]


class Rates(Protocol):
    """The settings that a function which makes an optimizer gets: those of ``[optimization]``."""

    @property
    def lr(self) -> float:
        """The learning rate that the schedule scales."""

    @property
    def weight_decay(self) -> float:
        """The decay of matrices; vectors and bases have none (``param_groups``)."""


def adamw(model: nn.Module, settings: Rates) -> Optimizer:
    """AdamW for all parameters.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101.
    """
    return torch.optim.AdamW(param_groups(model, settings.weight_decay), lr=settings.lr)


def sgd(model: nn.Module, settings: Rates) -> Optimizer:
    """SGD with momentum 0.9; wants learning rates ten to a hundred times those of AdamW."""
    return torch.optim.SGD(param_groups(model, settings.weight_decay), lr=settings.lr, momentum=0.9)

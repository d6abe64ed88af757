"""What else could explain a gain: optimizers of the card's rows, as a row of a comparison names them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectralmoe.optim import OrthogonalExperts, make_optimizer

__all__ = ["shorter", "turned"]


class Turned(OrthogonalExperts):
    """Projectors in random directions, by one turn for all experts of a layer: their means keep the spectra, too."""

    def protect(self, outer: Tensor, total: Tensor, count: Tensor) -> Tensor:
        made = super().protect(outer, total, count)
        turn = torch.linalg.qr(torch.randn_like(made[0]))[0]
        return turn @ made @ turn.mT


class Shorter(OrthogonalExperts):
    """Steps in the optimizer's own direction, each expert's as short as its projection."""

    def project(self, step: Tensor, free: Tensor) -> Tensor:
        shares = [
            torch.linalg.vector_norm(each, dim=(1, 2), keepdim=True) for each in (super().project(step, free), step)
        ]
        return step * (shares[0] / shares[1].clamp_min(torch.finfo(step.dtype).tiny))


def turned(model: nn.Module, settings: Any, **options: Any) -> Optimizer:
    """The run's optimizer with ``Turned`` around it."""
    optimizer = make_optimizer(settings.optimizer, model, settings)
    Turned(optimizer, model, **options)
    return optimizer


def shorter(model: nn.Module, settings: Any, **options: Any) -> Optimizer:
    """The run's optimizer with ``Shorter`` around it."""
    optimizer = make_optimizer(settings.optimizer, model, settings)
    Shorter(optimizer, model, match_norm=False, **options)
    return optimizer

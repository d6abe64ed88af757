"""Gradient descent on the unit sphere, for parameters that are directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from spectralmoe.errors import UserError

__all__ = ["SphereStep"]


class SphereStep(Optimizer):
    r"""Optimizes parameters whose rows are points on the unit sphere, by projected gradient descent.

    .. math:: g_\perp = g - \langle g, v\rangle v, \qquad v \leftarrow \frac{v - \eta g_\perp}{\|v - \eta g_\perp\|}

    v is a row of a parameter (..., D), normalised before the step, and g its gradient. Parameters that are no
    directions, such as an amplitude, go to another optimizer. Source: the projected descent of "Guided by the Experts",
    arXiv 2510.07205.

    Args:
        params: the parameters, each with at least one dimension.
        lr: eta > 0.

    Raises:
        UserError: the learning rate is not positive, or a parameter is a scalar.

    >>> v = nn.Parameter(torch.tensor([[1.0, 0.0]]))
    >>> optimizer = SphereStep([v], lr=1.0)
    >>> (v @ torch.tensor([5.0, -1.0])).sum().backward()  # the gradient along v does not count
    >>> _ = optimizer.step()
    >>> torch.allclose(v, torch.tensor([[0.5**0.5, 0.5**0.5]]))
    True
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.1) -> None:
        if not lr > 0:
            raise UserError(f"SphereStep: lr must be positive, got {lr}")
        super().__init__(params, {"lr": lr})
        if any(not p.dim() for group in self.param_groups for p in group["params"]):
            raise UserError("SphereStep: a scalar parameter is no direction; give it to another optimizer")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take one step with all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.copy_(_moved(parameter, parameter.grad, group["lr"]))
        return loss


def _moved(direction: Tensor, gradient: Tensor, lr: float) -> Tensor:
    v = F.normalize(direction, dim=-1)
    tangent = gradient - (gradient * v).sum(-1, keepdim=True) * v
    return F.normalize(v - lr * tangent, dim=-1)

"""Bounds how far the output of some layers moves if their input moves by at most r, for each token by itself.

Hein & Andriushchenko, "Formal Guarantees on the Robustness of a Classifier against Adversarial Manipulation",
arXiv 1705.08475, section 2: Lipschitz constants that hold in a ball around the token alone are far smaller than global
ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from spectralmoe.errors import UserError
from spectralmoe.linalg import sigma_max
from spectralmoe.scorers.base import gamma
from spectralmoe.torch_private import has_forward_hooks

__all__ = ["Travel", "travel_bound"]

Travel = Callable[[Tensor], Tensor]
"""A function from the radius (N,) of a ball around each token to a bound (N,) on how far the output moves in it."""


@torch.no_grad()
def travel_bound(processor: nn.Sequential, x: Tensor, precision: torch.dtype = torch.float64) -> tuple[Tensor, Travel]:
    r"""Return ``processor(x)`` (N, D') and a bound :math:`\rho(r) \ge \max_{\|d\| \le r} \|\hat f(x + d) - f(x)\|`.

    f is the processor, and :math:`\hat f` is f computed in ``precision``: the rounding error of each layer is added to
    its bound (``scorers.base.gamma``).

    The bounds of the layers are chained. Each holds at the layer's input u, for the radius r that arrives there:

    - Linear: :math:`\sigma_1(W)\,r`; before a ReLU of the rows alone that may be active in the ball,
      :math:`w_j u + b_j + \|w_j\| r > 0`; ReLU: r.
    - LayerNorm with deviation s(u): (c, sqrt(D eps)), c the centred u, has norm sqrt(D) s and is scaled to norm
      sqrt(D): a turn by at most arcsin q, :math:`q = r/(\sqrt D\,s)`, so
      :math:`\max|g|\sqrt D\; 2\sin(\tfrac12 \arcsin q)`, or :math:`\max|g|\, 2\sqrt D` where q > 1.
    - BatchNorm1d in evaluation: its largest factor times r.

    Raises:
        UserError: a layer is of another kind, or a subclass of one of these; it has forward hooks; or BatchNorm1d is in
            training mode.

    >>> z, rho = travel_bound(nn.Sequential(nn.Identity(), nn.ReLU()), torch.tensor([[1.0, -2.0]]))
    >>> z.tolist(), rho(torch.tensor([0.5])).tolist()
    ([[1.0, 0.0]], [0.5])
    """
    layers: list[nn.Module | None] = list(processor)
    bounds: list[Travel] = []
    for layer, following in zip(processor, [*layers[1:], None], strict=True):
        bounds.append(_bound(layer, x, type(following) is nn.ReLU, precision))
        x = layer(x)

    def travel(radius: Tensor) -> Tensor:
        for bound in bounds:
            radius = bound(radius)
        return radius

    return x, travel


def _bound(layer: nn.Module, x: Tensor, gated: bool, precision: torch.dtype) -> Travel:
    name, kind = type(layer).__name__, type(layer)
    if has_forward_hooks(layer):
        raise UserError(f"certificate: a {name} of the processor has forward hooks, which may change what it does")
    if is_parametrized(layer):  # the class of such a layer is new, and its weight is what the forward uses
        kind = kind.__mro__[1]
    if kind is nn.Identity or kind is nn.ReLU:
        return lambda radius: radius
    if kind is nn.Linear and isinstance(layer, nn.Linear):
        exact = _active_rows(layer, x) if gated else partial(_times, sigma_max(layer.weight))
        error = gamma(layer.in_features + 2, precision)
        return _rounded(exact, x, error * layer.weight.norm(), error * _size(layer.bias))
    if kind is nn.LayerNorm and isinstance(layer, nn.LayerNorm):
        return _normalised(layer, x, precision)
    if kind is nn.BatchNorm1d and isinstance(layer, nn.BatchNorm1d):
        factor, error = _batch_norm_factor(layer), gamma(8, precision)
        return _rounded(partial(_times, factor), x, error * factor, error * _shift(layer, factor))
    known = "torch's own Linear, ReLU, LayerNorm, BatchNorm1d or Identity"
    raise UserError(f"certificate: no bound is known for {name} in the processor; use {known}")


def _times(factor: Tensor, radius: Tensor) -> Tensor:
    return torch.where(factor > 0, factor * radius, 0)  # 0 * inf is 0: such a layer moves nothing


def _size(parameter: Tensor | None) -> float:
    return 0.0 if parameter is None else float(parameter.norm())


def _rounded(exact: Travel, x: Tensor, slope: Tensor, constant: float) -> Travel:
    """``exact`` and a rounding error of ``slope |u| + constant`` wherever the input u lies in the ball."""
    size = x.norm(dim=-1)
    return lambda radius: exact(radius) + _times(slope, size + radius) + constant


def _active_rows(layer: nn.Linear, x: Tensor) -> Travel:
    weight, values = layer.weight, layer(x)
    norms, gram = weight.norm(dim=1), weight @ weight.T

    def travel(radius: Tensor) -> Tensor:
        active = (values + norms * radius[:, None] > 0).to(x.dtype)
        if weight.shape[0] <= weight.shape[1]:
            grams = active[:, :, None] * gram * active[:, None]
        else:
            grams = (weight.T * active[:, None]) @ weight
        return _times(torch.linalg.eigvalsh(grams)[:, -1].clamp_min(0).sqrt(), radius)

    return travel


def _normalised(layer: nn.LayerNorm, x: Tensor, precision: torch.dtype) -> Travel:
    """Rounding grows with the square of the size over the deviation; no output is longer than gain sqrt(D)."""
    side = float(x.shape[-1] ** 0.5)
    variance = (x - x.mean(-1, keepdim=True)).square().mean(-1)
    reach = side * (variance + layer.eps).sqrt()
    gain = 1.0 if layer.weight is None else float(layer.weight.abs().max())
    size, constant = x.norm(dim=-1), gamma(2, precision) * _size(layer.bias)
    error = gamma(3 * x.shape[-1] + 8, precision)

    def travel(radius: Tensor) -> Tensor:
        q = radius / reach
        unsure = error * (1 + (size + radius) / (reach - radius)).square()
        turn = torch.where(q < 1, 2 * (q.asin() / 2).sin() + unsure, 2.0).clamp_max(2)
        return side * gain * turn + constant

    return travel


def _shift(layer: nn.BatchNorm1d, factor: Tensor) -> float:
    """How long what a BatchNorm1d subtracts and adds may be, at its output."""
    return float(factor) * _size(layer.running_mean) + _size(layer.bias)


def _batch_norm_factor(layer: nn.BatchNorm1d) -> Tensor:
    if layer.training or layer.running_var is None:
        raise UserError("certificate: BatchNorm1d with batch statistics ties the tokens together; use it in eval()")
    gain = torch.ones_like(layer.running_var) if layer.weight is None else layer.weight
    factor: Tensor = (gain / (layer.running_var + layer.eps).sqrt()).abs().amax()
    return factor

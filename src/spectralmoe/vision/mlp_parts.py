"""The matrices of an MLP that a stacked ``FeedForward`` bank can hold: plain with GELU or ReLU, or gated with SiLU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.experts.feed_forward import Activation, activate
from spectralmoe.vision.random_weights import with_random_weights

__all__ = ["MlpParts", "is_convolutional", "parts_of"]

_Linear = nn.Linear | nn.Conv2d


class MlpParts(NamedTuple):
    """Up (H, D), for swiglu [gate; value] (2H, D), and down (D, H), as ``FeedForward`` has them."""

    activation: Activation
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """The MLP's output for rows x (M, D)."""
        return F.linear(activate(self.activation, F.linear(x, self.up, self.up_bias)), self.down, self.down_bias)


@torch.no_grad()
def parts_of(mlp: nn.Module) -> MlpParts | None:
    r"""The parts of a linear, GELU or ReLU, linear network, or of one with a SiLU gate; None for any other.

    A gate is known by what is computed, not by names: two or three linear layers that give
    :math:`W_2(\mathrm{silu}(G x) \odot U x)` under random weights. So G and U may be layers of their own or halves of
    one, in either order. A 1x1 convolution is a linear layer.
    """
    return _plain(mlp) or _gated(mlp)


def is_convolutional(mlp: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in mlp.modules())


def _plain(mlp: nn.Module) -> MlpParts | None:
    children = [part for part in mlp.children() if not _does_nothing(part)]
    if len(children) != 3:
        return None
    up, act, down = children
    activation = _activation(act)
    if activation is None or not _is_linear(up) or not _is_linear(down):
        return None
    fits = up.weight.shape[0] == down.weight.shape[1] and (up.bias is None) == (down.bias is None)
    return MlpParts(activation, up.weight.flatten(1), up.bias, down.weight.flatten(1), down.bias) if fits else None


def _gated(mlp: nn.Module) -> MlpParts | None:
    """The first reading of the linear layers that computes the same, under random weights."""
    if next(_readings(mlp), None) is None:
        return None
    trial, draw = with_random_weights(mlp)
    trial.double().train()  # a dropout shows
    rows = torch.randn(8, next(_readings(trial)).up.shape[1], generator=draw, dtype=torch.float64)
    try:
        y = trial(rows[:, :, None, None])[:, :, 0, 0] if is_convolutional(trial) else trial(rows)
        fits = (torch.allclose(reading.forward(rows), y) for reading in _readings(trial))
        return next((reading for fit, reading in zip(fits, _readings(mlp), strict=True) if fit), None)
    except Exception:  # whatever the MLP's own code says to lone rows, or to a call without its other inputs
        return None


def _readings(mlp: nn.Module) -> Iterator[MlpParts]:
    """What the linear layers could be: gate, value and down, or gate and value in one, and down; nothing else in it."""
    leaves = [module for module in mlp.modules() if next(module.children(), None) is None]
    layers = [leaf for leaf in leaves if _is_linear(leaf)]
    rest = [leaf for leaf in leaves if not _is_linear(leaf)]
    acts = [leaf for leaf in rest if not _does_nothing(leaf)]
    holds_more = sum(p.numel() for layer in layers for p in layer.parameters()) != sum(
        p.numel() for p in mlp.parameters()
    )
    if len(layers) not in (2, 3) or len(acts) > 1 or holds_more or len({layer.bias is None for layer in layers}) > 1:
        return
    for down in layers:
        dim, hidden = down.weight.shape[:2]
        others = [layer for layer in layers if layer is not down]
        rows = 2 * hidden if len(others) == 1 else hidden
        if all(other.weight.shape[:2] == (rows, dim) for other in others):
            yield from _orders(others, down)


def _orders(ups: list[_Linear], down: _Linear) -> Iterator[MlpParts]:
    """Gate before value, and value before gate."""
    weights = torch.cat([up.weight.flatten(1) for up in ups]).chunk(2)
    biases = None if down.bias is None else torch.cat([up.bias for up in ups if up.bias is not None]).chunk(2)
    for order in ((0, 1), (1, 0)):
        up = torch.cat([weights[part] for part in order])
        up_bias = None if biases is None else torch.cat([biases[part] for part in order])
        yield MlpParts("swiglu", up, up_bias, down.weight.flatten(1), down.bias)


def _does_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def _is_linear(module: nn.Module) -> TypeGuard[_Linear]:
    pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear) or pointwise


def _activation(act: nn.Module) -> Activation | None:
    """What ``act`` computes, found by trying: libraries have classes of their own for GELU, exact or not."""
    if next(act.parameters(), None) is not None:
        return None
    x = torch.linspace(-6, 6, 101)
    y = act(x.clone())
    if torch.allclose(y, F.gelu(x), atol=1e-6):
        return "gelu"
    return "relu" if torch.equal(y, F.relu(x)) else None

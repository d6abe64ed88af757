"""Which parameters of a model with MoE layers are trained: its routers alone, or all others."""

from __future__ import annotations

from torch import nn

from spectralmoe.hf.layers import find_layers
from spectralmoe.layers import moe_layers, stock_experts, unwrapped

__all__ = ["freeze_routers", "train_only_routers"]


def freeze_routers(model: nn.Module) -> None:
    """Freeze the routers of ``model``, stock ones too, so that their choices stay functions of the tokens alone.

    Frozen routers of this library rest as a whole: their selection biases do not move.

    Raises:
        UserError: the model holds no MoE layer, or one of a kind that cannot be read.

    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK
    >>> layer = MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 16))
    >>> freeze_routers(layer)
    >>> [name for name, parameter in layer.named_parameters() if not parameter.requires_grad]
    ['router.scorer.weight']
    """
    for router in _routers(model):
        router.requires_grad_(False)


def train_only_routers(model: nn.Module) -> None:
    """Freeze all of ``model`` but its routers, stock ones too.

    Raises:
        UserError: the model holds no MoE layer, or one of a kind that cannot be read.

    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK
    >>> layer = MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 16))
    >>> train_only_routers(layer)
    >>> [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    ['router.scorer.weight']
    """
    routers = _routers(model)
    model.requires_grad_(False)
    for router in routers:
        router.requires_grad_(True)


def _routers(model: nn.Module) -> list[nn.Module]:
    if stock_experts(model):
        return [layer.router for layer in find_layers(unwrapped(model))]
    return [layer.router for layer in moe_layers(model).values() if layer.router is not None]

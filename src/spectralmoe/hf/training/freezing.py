"""Which parameters of a model with MoE layers are trained: all but its routers or its experts, or its routers alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from spectralmoe.errors import UserError
from spectralmoe.hf.layers import find_layers
from spectralmoe.layers import moe_layers, stock_experts, unwrapped
from spectralmoe.moe import MoE
from spectralmoe.router import Router
from spectralmoe.scorers import Scorer

__all__ = ["freeze_experts", "freeze_routers", "train_only_routers"]


def freeze_experts(model: nn.Module) -> None:
    """Freeze the routed experts of ``model``, stock ones too; routers, shared experts and all else go on training.

    A router that reads the bases of the experts (``BasisScorer``) has no parameters of its own, so it is frozen, too.

    Raises:
        UserError: the model holds no MoE layer, or one of a kind that cannot be read.

    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK
    >>> layer = MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 16), shared=nn.Linear(8, 8))
    >>> freeze_experts(layer)
    >>> [name for name, parameter in layer.named_parameters() if not parameter.requires_grad]
    ['experts.up', 'experts.down']
    """
    for experts in _experts(model):
        experts.requires_grad_(False)


def freeze_routers(model: nn.Module) -> None:
    """Freeze the routers of ``model``, stock ones too: the same tokens go on getting the same experts.

    The selection biases and statistics of frozen routers of this library do not move either.

    Raises:
        UserError: the model holds no MoE layer, or one of a kind that cannot be read; a router without parameters of
            its own, which reads the experts'.

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
        UserError: as ``freeze_routers``.

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


def _routers(model: nn.Module) -> Sequence[nn.Module]:
    if stock_experts(model):
        return [layer.router for layer in find_layers(unwrapped(model))]
    routers = [layer.router for layer in moe_layers(model).values() if layer.router is not None]
    for router in routers:
        _refuse_borrowed(router)
    return routers


def _refuse_borrowed(router: Router) -> None:
    """Refuse a router whose parameters are all those of its experts: freezing it alone would freeze nothing."""
    if type(router.scorer).bind_experts is not Scorer.bind_experts and next(router.parameters(), None) is None:
        raise UserError(
            f"{type(router.scorer).__name__} has no parameters of its own, it reads those of the experts; "
            "freeze_experts(model) freezes both, requires_grad_() on what it reads trains it"
        )


def _experts(model: nn.Module) -> list[nn.Module]:
    own = [] if stock_experts(model) else [each for each in moe_layers(model).values() if isinstance(each, MoE)]
    return [layer.experts for layer in own or find_layers(unwrapped(model))]

"""A router of this library in the place of a Hugging Face router: it returns what the family's own returns.

Its class is made at run time from the class of the stock router, so that all that transformers does by that class goes
on: recording of ``router_logits``, auxiliary losses, initialisation.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from spectralmoe.context import rows_of
from spectralmoe.diagnostics.watch import WithOwnRouter
from spectralmoe.hf.calls import Calls
from spectralmoe.hf.layer import HFLayer
from spectralmoe.hf.routers.rules import Rule
from spectralmoe.placement import Placement
from spectralmoe.recording import Recordable
from spectralmoe.router import Router
from spectralmoe.routing import Routing
from spectralmoe.sharding import full

__all__ = ["SwappedLayer", "SwappedRouter", "swapped_router"]

_OWN = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


class SwappedRouter(Recordable):
    """Holds a ``Router`` and returns its routings in the form of the stock router whose place it took.

    The stock router's tensors stay as buffers under their own names, so that a saved model is one of its family and
    loads in plain transformers, with the router that it had. ``swapped_router`` makes one.

    Attributes:
        family: the class of the stock router; each has a subclass of its own.
        router: scorer and selector.
        rule: how the family routes and what its routers return.
        calls: the frames of the stack around it.
        placement: which places of the stacked experts hold each expert of the router; None: place e is expert e.
        stock: the stock router, alone in a tuple, so that it is no submodule.
    """

    family: type[nn.Module] = nn.Module
    router: Router
    rule: Rule
    calls: Calls
    placement: Placement | None
    stock: tuple[nn.Module]

    @property
    def keepable(self) -> tuple[str, ...]:
        """What the router reads; the experts are transformers' own."""
        return ("tokens",)

    def layer_path(self, path: str) -> str:
        """The path of the layer that this router is a part of."""
        return path.rpartition(".")[0]

    def watched(self, model: nn.Module, path: str) -> SwappedLayer:
        """The layer in ``model`` around this router, for the instruments."""
        parts = path.split(".")
        length = next((place for place, part in enumerate(parts) if part == "modules_to_save"), len(parts)) - 1
        outer = ".".join(parts[:length])
        return SwappedLayer(outer, model.get_submodule(outer), ".".join(parts[length:]))

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """Tokens (N, D) or (B, S, D) -> what the stock router returns; what it takes beside tokens is not read."""
        routing, tokens = self._route(hidden_states)
        routing = self.rule.limited(routing)
        seen = self.seen(tokens, self.names_to_keep(), streams=self.router.scorer.streams_tokens)
        self.leave(routing, None, seen, None)
        placed = routing if self.placement is None else self.placement(routing)
        return self.rule.arrange(placed, hidden_states)

    def _route(self, hidden_states: Tensor) -> tuple[Routing, Tensor]:
        """The routing, and the tokens in the sequences that they came in, if that is known."""
        fed, frame = self.take_feed(hidden_states.device), self.calls.frame()
        tokens, mask = hidden_states, frame.mask
        if tokens.dim() == 2 and frame.shape is not None and frame.shape[0] * frame.shape[1] == len(tokens):
            tokens = tokens.view(*frame.shape, -1)
        if mask is not None and mask.shape != tokens.shape[:-1]:
            mask = None
        if fed is None:
            return self.router(tokens, mask=mask), tokens
        mask = mask if fed.mask is None else fed.mask
        side = rows_of(fed.context, tokens, mask)
        return self.router(tokens, mask=mask, context=side, replay=fed.next_replay()), tokens

    def restored(self) -> nn.Module:
        """The stock router with the tensors that this module keeps of it, where they are now."""
        (stock,) = self.stock
        for name, parameter in stock.named_parameters():
            parameter.data = self.get_buffer(name)
        for name, buffer in stock.named_buffers():
            buffer.data = self.get_buffer(name)
        return stock.train(self.training)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (self.family,), self.__getstate__()


def swapped_router(stock: nn.Module, router: Router, rule: Rule, calls: Calls) -> SwappedRouter:
    """``router`` in the form of the router ``stock``, whose attributes, hooks and mode it has."""
    swapped = _empty(type(stock))
    nn.Module.__init__(swapped)
    swapped.without_tapes()
    swapped.__dict__.update({name: value for name, value in vars(stock).items() if name not in _OWN})
    _keep_tensors(swapped, stock)
    swapped.router, swapped.rule, swapped.calls, swapped.stock = router.train(stock.training), rule, calls, (stock,)
    swapped.placement = None
    return swapped


def _empty(family: type[nn.Module]) -> SwappedRouter:
    made: type[SwappedRouter] = _class_for(family)  # type: ignore[arg-type]
    return made.__new__(made)


@cache
def _class_for(family: type[nn.Module]) -> Any:
    """The subclass of a stock router's class, one for each."""
    return type(f"Swapped{family.__name__}", (SwappedRouter, family), {"family": family, "__module__": __name__})


def _keep_tensors(keeper: nn.Module, module: nn.Module) -> None:
    """Give ``keeper`` all tensors of ``module`` as buffers of the same names: none is trained."""
    for name, parameter in module.named_parameters(recurse=False):
        keeper.register_buffer(name, parameter.detach())
    for name, buffer in module.named_buffers(recurse=False):
        keeper.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
    for name, child in module.named_children():
        inside = nn.Module()
        _keep_tensors(inside, child)
        keeper.add_module(name, inside)


class SwappedLayer(WithOwnRouter, HFLayer):
    """A MoE layer of a Hugging Face model with a router of this library.

    Args:
        path, layer, router: as for ``HFLayer``.
    """

    router: SwappedRouter

    def __init__(self, path: str, layer: nn.Module, router: str) -> None:
        super().__init__(path, layer, router)
        self.num_experts = self.router.router.num_experts  # copies are places, no experts
        self.top_k = self.router.router.k

    def _answered_slots(self) -> None:
        """Nothing is asked: the selector says it."""

    @property
    def own_router(self) -> Router:
        """The router in the place of the family's."""
        return self.router.router

    @property
    def live_matrix(self) -> Tensor | None:
        """The same with gradient."""
        return self.router.router.scorer.matrix

    @property
    def correction_bias(self) -> Tensor | None:
        """The selection bias as it is now (E,); None without."""
        biases = (getattr(part, "bias", None) for part in self.router.router.selector.modules())
        bias = next((value for value in biases if isinstance(value, Tensor)), None)
        return None if bias is None else full(bias).detach()

    @torch.no_grad()
    def raw_logits(self, x: Tensor) -> Tensor:
        """The router's own logits."""
        return self.route(x).logits

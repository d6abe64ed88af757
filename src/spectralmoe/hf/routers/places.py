"""The places of routers in a Hugging Face model: routers of this library put in, looked up, and taken out again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from spectralmoe.errors import UserError
from spectralmoe.hf.calls import Calls
from spectralmoe.hf.frames import stack_around
from spectralmoe.hf.layer import HFLayer
from spectralmoe.hf.layers import find_layers
from spectralmoe.hf.routers.rules import Rule
from spectralmoe.hf.routers.swapped import SwappedRouter, swapped_router
from spectralmoe.layers import moe_layers
from spectralmoe.router import Router

__all__ = ["put_in", "refuse_adapters", "refuse_placed", "stock_layers", "swapped_routers", "take_out"]


def put_in(model: nn.Module, routers: Mapping[HFLayer, tuple[Router, Rule]]) -> None:
    """Put a router, with the rule of the stock one, into each of these layers of ``model``, which were not swapped."""
    calls: dict[nn.Module, Calls] = {}
    for layer, (router, rule) in routers.items():
        stack = stack_around(model, layer.path)
        if stack not in calls:
            calls[stack] = Calls(stack)
        model.set_submodule(layer.router_path, swapped_router(layer.router, router, rule, calls[stack]))


def take_out(model: nn.Module, routers: Iterable[SwappedRouter]) -> None:
    """Put the stock routers back, the same modules with the tensors that ``model`` kept of them; once is enough."""
    routers, paths = list(routers), {module: path for path, module in model.named_modules()}
    for router in routers:
        if router in paths:
            model.set_submodule(paths[router], router.restored())
    needed = {module.calls for module in model.modules() if isinstance(module, SwappedRouter)}
    for calls in {router.calls for router in routers} - needed:
        calls.close()


@contextmanager
def stock_layers(model: nn.Module) -> Iterator[dict[str, HFLayer]]:
    """The swapped layers of ``model`` by name, with their stock routers in place.

    Our routers are restored after the block.
    """
    paths = {path: module for path, module in model.named_modules() if isinstance(module, SwappedRouter)}
    for path, router in paths.items():
        model.set_submodule(path, router.restored())
    try:
        yield {layer.name: layer for layer in find_layers(model) if layer.router_path in paths}
    finally:
        for path, router in paths.items():
            model.set_submodule(path, router)


def swapped_routers(model: nn.Module) -> dict[str, SwappedRouter]:
    """The swapped routers in ``model`` by the name of their layer.

    Raises:
        UserError: there is none.
    """
    layers = moe_layers(model) if any(isinstance(module, SwappedRouter) for module in model.modules()) else {}
    routers = {name: layer for name, layer in layers.items() if isinstance(layer, SwappedRouter)}
    if not routers:
        raise UserError(f"{type(model).__name__} holds no swapped router; swap_routers(model) puts them in")
    return routers


def refuse_placed(who: str, routers: Mapping[str, SwappedRouter]) -> None:
    """Refuse layers with copies of experts, which only our routers know how to use.

    Raises:
        UserError: there is one.
    """
    for name, router in routers.items():
        if router.placement is not None:
            raise UserError(
                f"{who}: {name} has copies of experts, which no router of its family can use; do it before "
                "replicate_and_quantize_experts"
            )


def refuse_adapters(who: str, model: nn.Module) -> None:
    """Refuse a model with adapters of PEFT, whose weights are not its own yet.

    Raises:
        UserError: it has some.
    """
    if getattr(model, "peft_config", None):
        raise UserError(f"{who}: the model holds adapters of PEFT; merge them first, by merge_and_unload()")

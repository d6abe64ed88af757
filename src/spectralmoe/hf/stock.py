"""Stock routers of Hugging Face models as layers that tapes can record: hooks read them and change nothing."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from spectralmoe.hf.frames import Frames
from spectralmoe.hf.layer import HFLayer
from spectralmoe.hf.layers import find_layers, refuse_shared
from spectralmoe.layers import moe_layers, stock_experts, unwrapped
from spectralmoe.recording import Recordable, recomputing

__all__ = ["recordable_layers"]


class StockLayer(Recordable):
    """A view of one MoE layer: whenever its router has run, it leaves the routing, with gradient, in the open tapes.

    It is no part of the model and has no parameters of its own.
    """

    def __init__(self, layer: HFLayer, frames: Frames) -> None:
        super().__init__()
        self.layer, self.frames = layer, frames
        self.names = list(inspect.signature(layer.router.forward).parameters)

    @property
    def keepable(self) -> tuple[str, ...]:
        """What the router reads; the experts are transformers' own."""
        return ("tokens",)

    @property
    def matrix(self) -> Tensor | None:
        """The router's matrix in fp32 (float64 stays), with gradient; None where it has several layers."""
        matrix = self.layer.live_matrix
        return None if matrix is None else matrix.to(torch.promote_types(matrix.dtype, torch.float32))

    @property
    def trains_router(self) -> bool:
        """Whether a forward trains the stock router."""
        return self.layer.router.training and any(p.requires_grad for p in self.layer.router.parameters())

    def __deepcopy__(self, memo: dict[int, Any]) -> StockLayer:
        """No copy: the hook of a copied router ends here, where it is not known."""
        return self

    def see(self, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
        """A forward hook of the router."""
        if not self.sinks or recomputing() or router is not self.layer.router:
            return
        self.training = router.training
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        tokens = next(value for value in inputs.values() if isinstance(value, Tensor))
        flat = tokens.reshape(-1, tokens.shape[-1])
        unhooked = saved_tensors_hooks(_as_it_is, _as_it_is)  # a checkpoint around does not do this again
        with torch.autocast(flat.device.type, enabled=False), unhooked:
            routing = self.layer.live_routing(self.layer.read(returned, flat))
            routing = self.frames.of(self.layer, tokens).put(routing)
        self.leave(routing, tokens=flat.clone() if "tokens" in self.names_to_keep() else None)


def _as_it_is(value: Tensor) -> Tensor:
    return value


@contextmanager
def recordable_layers(model: nn.Module) -> Iterator[dict[str, Recordable]]:
    """The MoE layers of any model for a ``Tape``, by name: views of those whose routers are stock.

    A layer or router of this library stands for itself. The hooks are gone after the block.

    Raises:
        UserError: the model holds no MoE layer, or one of a kind that cannot be read; two layers share a router.
    """
    if not stock_experts(model):
        yield moe_layers(model)
        return
    inside = unwrapped(model)
    found = find_layers(inside)
    refuse_shared(found)
    ours = {layer.name: part for layer in found for part in (layer.layer, layer.router) if isinstance(part, Recordable)}
    frames, layers = Frames(inside, [layer for layer in found if layer.name not in ours]), dict[str, Recordable]()
    with ExitStack() as hooks:
        frames.open()
        hooks.callback(frames.close)
        for layer in found:
            if layer.name in ours:
                layers[layer.name] = ours[layer.name]
                continue
            view = layers[layer.name] = StockLayer(layer, frames)
            hooks.callback(layer.router.register_forward_hook(view.see, with_kwargs=True).remove)
        yield layers

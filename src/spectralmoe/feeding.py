"""Side information and recorded choices for the MoE layers inside a model whose forward does not pass them on."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from spectralmoe.context import Context, Rows
from spectralmoe.layers import moe_layers
from spectralmoe.recording import Feed
from spectralmoe.tape import Tape

__all__ = ["feed"]


@contextmanager
def feed(
    model: nn.Module,
    *,
    mask: Tensor | None = None,
    context: Context | Rows | None = None,
    replay: Tape | None = None,
) -> Iterator[None]:
    """Hand side information to the MoE layers inside a model whose forward does not pass it on.

    Args:
        mask: (...) bool, True for a real token, for every layer.
        context: side information that parts read by name, for every layer.
        replay: reuse the choices of this tape, call by call; weights are recomputed from live logits. What is counted
            of such a forward is not what was replayed: selection biases rest, and ``load_balance`` and ``Monitor`` go
            by the choice that the router itself makes (``Routing.live``).

    The block belongs to its thread: the forwards of others see nothing of it. A backward inside it runs in this thread
    on every device.

    Call backward inside the block if the model uses activation checkpointing, for the forwards of this block alone: a
    recomputation gets the side information of the block it runs in. Where arithmetic does not repeat bit by bit, or
    noise is not repeated, a recomputation may choose other experts than its forward, and nothing tells: around backward
    alone, ``with feed(model, replay=tape)`` pins the choice.

    Raises:
        UserError: no MoE layer; a layer that the replayed tape does not hold, or that is called more often.
    """
    layers, compiling = moe_layers(model), torch.compiler.is_compiling()
    feeds = {}
    for name in layers:
        routings = None if replay is None else [item.routing for item in replay.layer(name)]
        feeds[name] = Feed(mask, context, routings)
    before = {name: layer.here.fed for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.here.fed = feeds[name]
    try:
        with nullcontext() if compiling else torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        for name, layer in layers.items():
            feeds[name].closed, outer = True, before[name]
            layer.here.fed = feeds[name] if outer is None else outer
            if outer is None and torch.is_grad_enabled() and not compiling:
                layer.ended = weakref.ref(feeds[name])

"""``feed``: it hands masks, side information and recorded choices to the MoE layers inside any model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from spectralmoe.context import Context, Rows
from spectralmoe.errors import UserError, one_of
from spectralmoe.layers import moe_layers
from spectralmoe.recording import Feed, Recordable
from spectralmoe.routing import EMPTY, Routing
from spectralmoe.tape import Tape

__all__ = ["feed"]


@contextmanager
def feed(
    model: nn.Module,
    *,
    mask: Tensor | None = None,
    context: Context | Rows | None = None,
    replay: Tape | None = None,
    indices: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Hand a mask, side information or recorded choices to all MoE layers of ``model`` inside a ``with`` block.

    It is for models whose own forward does not pass these on to their layers.

    Args:
        model: a model with MoE layers.
        mask: (...) bool, True for a real token.
        context: side information that scorers, selectors and experts read by name.
        replay: a tape of ``record``, whose choices are used again, call by call. The weights of the chosen experts are
            recomputed from the logits of this forward. What the router itself would have chosen is ``Routing.live``;
            ``load_balance`` and ``Monitor`` read that, and selection biases do not move.
        indices: choices that another engine recorded: layer name -> experts (N, K) or (..., K) of one call, -1 in an
            empty slot. Layers that are not named choose for themselves. If every layer of a model is an MoE layer,
            vLLM's ``routed_experts`` (N, layers, K) become ``dict(zip(moe_layers(model), routed.unbind(1)))``.

    The block holds for its thread alone: forwards in other threads see nothing of it. A backward inside it runs in this
    thread on every device.

    With activation checkpointing, call backward inside the block, and only for forwards of this block: the forward that
    is recomputed gets what the block hands out. If arithmetic or noise does not repeat exactly, the recomputation may
    choose other experts than the first forward did, without an error. ``with feed(model, replay=tape)`` around backward
    prevents this.

    Raises:
        UserError: the model has no MoE layer; the tape does not hold a layer, or a layer is called more often than it
            was recorded; tape and indices are both given; indices name an unknown layer, are no whole numbers, name an
            expert twice or one that does not exist, or leave a real token without an expert.

    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
    >>> layers = torch.nn.Sequential(MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 16)))
    >>> with feed(layers, indices={"0": torch.tensor([[3, 1], [0, 2]])}), record(layers) as tape:
    ...     y = layers(torch.randn(2, 8))
    >>> tape[0].routing.indices.tolist()
    [[3, 1], [0, 2]]
    """
    layers, compiling = moe_layers(model), torch.compiler.is_compiling()
    choices = _choices(layers, replay, indices, mask)
    feeds = {name: Feed(mask, context, choices.get(name)) for name in layers}
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


def _choices(
    layers: Mapping[str, Recordable], replay: Tape | None, indices: Mapping[str, Tensor] | None, mask: Tensor | None
) -> dict[str, list[Routing | Tensor]]:
    """What is replayed in each layer, call by call; nothing of a layer that chooses for itself."""
    if replay is not None and indices is not None:
        raise UserError("feed(): replay= and indices= both say what is chosen; give one of them")
    if replay is not None:
        return {name: [item.routing for item in replay.layer(name)] for name in layers}
    for name in indices or {}:
        if name not in layers:
            raise one_of("MoE layer", name, layers)
    return {name: [_indices(name, layers[name], value, mask)] for name, value in (indices or {}).items()}


def _indices(name: str, layer: Recordable, value: Tensor, mask: Tensor | None) -> Tensor:
    """The experts (N, K) int64 that ``value`` names."""
    start = f"feed(indices=...): those of layer {name!r}"
    if not isinstance(value, Tensor) or value.dim() < 2 or value.is_floating_point() or value.dtype == torch.bool:
        kind = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"{start} must be whole numbers (N, K), got {kind.removeprefix('torch.')}")
    indices = value.detach().long().flatten(0, -2)
    least, most = (int(f(indices)) if indices.numel() else 0 for f in (torch.amin, torch.amax))
    experts = most + 1 if layer.router is None else layer.router.num_experts
    if least < EMPTY or most >= experts:
        wrong = least if least < EMPTY else most
        raise UserError(f"{start} name expert {wrong}; there are 0 to {experts - 1}, and {EMPTY} for an empty slot")
    ordered = indices.sort(-1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != EMPTY)).any(-1)
    if bool(twice.any()):
        raise UserError(f"{start} name one expert twice for token {int(twice.int().argmax())}; name it once")
    empty = (indices == EMPTY).all(-1)
    if mask is not None and mask.numel() == len(empty):  # a mask of another shape is refused by the router
        empty = empty & mask.reshape(-1).bool().to(empty.device)
    if bool(empty.any()):
        raise UserError(
            f"{start} have no expert for token {int(empty.int().argmax())}; leave padding out by mask=, and give every "
            "other token its choice"
        )
    return indices

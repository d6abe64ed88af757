"""``record``: a tape of the MoE layers of any model, of this library or of Hugging Face's transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn

from spectralmoe.layers import moe_layers, stock_experts
from spectralmoe.recording import Recordable
from spectralmoe.tape import Needs, Tape

__all__ = ["record"]


@contextmanager
def record(model: nn.Module, keep: Sequence[str] = (), *, terms: Mapping[str, Needs] | None = None) -> Iterator[Tape]:
    """Record what the MoE layers of ``model`` do inside the block.

    Of a Hugging Face model as it comes, its stock routers are read: routings with gradient, without an expert for
    padding by the attention mask, so that terms can be put on them. No part of it is changed.

    Args:
        model: any module that holds MoE layers; wrapped, compiled or sharded as you like.
        keep: also keep "tokens" (N, D), what the router read, or "input" (M, D), "hidden" (M, H), "output" (M, D) of
            the experts, sorted by expert, or what they say of themselves (``Experts.says``). A forward that keeps what
            experts make takes the grouped dispatch, and so does its second under activation checkpointing. Stock
            layers of Hugging Face models keep "tokens" alone.
        terms: also keep what these ``Term`` s need, of the layers that they are about.

    With ``torch.compile`` and activation checkpointing together, compile what holds the checkpoints, not what is
    inside them, and set ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True``; without it
    the recorded forward is right, but runs uncompiled.

    Raises:
        UserError: the model holds no MoE layer, or one of a kind that cannot be read; a name to keep that is unknown.

    >>> import torch
    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK
    >>> layer = MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 16))
    >>> with record(layer) as tape:
    ...     y = layer(torch.randn(10, 8))
    >>> int(tape[0].routing.counts().sum())
    20
    """
    layers: AbstractContextManager[dict[str, Recordable]]
    if stock_experts(model):
        from spectralmoe.hf.stock import recordable_layers

        layers = recordable_layers(model)
    else:
        layers = nullcontext(moe_layers(model))
    with layers as named, Tape(named, keep, terms=terms) as tape:
        yield tape

"""``record``: it records what the MoE layers of a model do, of this library's or of Hugging Face's models."""

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
    """Record what the MoE layers of ``model`` do inside a ``with`` block, as a ``Tape``.

    A tape is a sequence of records (``Record``), one for each forward of each layer: the routing of the tokens and, if
    asked for, tensors. Losses (``penalty``), diagnostics and ``after_step`` read it.

    In a Hugging Face model without layers of this library, the model's own routers are recorded. Their routings have a
    gradient and no expert for padding, so regularizers work on them. The model is not changed.

    Args:
        model: any module that holds MoE layers; it may be wrapped, compiled or sharded.
        keep: names of tensors to keep: "tokens" (N, D), what the router read; of the experts, with rows sorted by
            expert, "input" (M, D), "hidden" (M, H) and "output" (M, D); and names in ``Experts.says``. A layer that
            keeps tensors of its experts uses the grouped dispatch. Hugging Face's own layers keep "tokens" alone.
        terms: name -> ``Term``; the tensors that the terms read are kept, in the layers that they are for.

    If ``torch.compile`` and activation checkpointing are used together, compile the module that holds the checkpoints,
    not the modules inside them, and set ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True``.
    Otherwise the recorded forward is right but runs uncompiled.

    Raises:
        UserError: the model holds no MoE layer, or one that cannot be read; or a name in ``keep`` is unknown.

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

"""The work around an optimizer step: retractions, streaming statistics, selection bias, parameter groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from spectralmoe.errors import UserError
from spectralmoe.moe import Recordable
from spectralmoe.router import Router
from spectralmoe.tape import Record, Tape, moe_layers

__all__ = ["Attachment", "after_step", "attach", "before_step", "param_groups"]


def before_step(model: nn.Module, *tapes: Tape) -> None:
    """Call after backward, before ``optimizer.step()``: lets scorers act on their gradients.

    Args:
        tapes: the tape of this step, or one for each micro-batch under gradient accumulation.

    Raises:
        UserError: a tape of another model; an empty tape.
    """
    layers = moe_layers(model)
    _before(layers, _records(layers, tapes))


def after_step(model: nn.Module, *tapes: Tape, group: Any = None) -> None:
    """Call after ``optimizer.step()``: retracts bases, refreshes statistics, moves selection biases.

    Args:
        tapes: the tape of this step, or one for each micro-batch under gradient accumulation.
        group: process group over which the int64 counts are summed; None: the default group, where
            ``torch.distributed`` is initialised. Every rank must call.

    Raises:
        UserError: a tape of another model; an empty tape.
    """
    layers = moe_layers(model)
    _after(layers, _records(layers, tapes), group)


class Attachment:
    """What ``attach`` returns; ``remove()`` undoes it."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, group: Any) -> None:
        self._layers = moe_layers(model)
        self._tape = Tape(model, training_only=True, attached=True)
        self._group = group
        self._records: tuple[Record, ...] = ()
        if any(sink.attached for layer in self._layers.values() for sink in layer.sinks):
            raise UserError("attach: this model is attached to an optimizer already; remove() that attachment first")
        self._tape.open()
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Stop recording and take the hooks off the optimizer."""
        self._tape.seal()
        for hook in self._hooks:
            hook.remove()

    def _before_step(self, *_: Any) -> None:
        self._records = self._tape.drain()
        _before(self._layers, self._records)

    def _after_step(self, *_: Any) -> None:
        _after(self._layers, (*self._records, *self._tape.drain()), self._group)  # the rest: forwards of a closure
        self._records = ()


def attach(optimizer: Optimizer, model: nn.Module, *, group: Any = None) -> Attachment:
    """Do ``before_step`` and ``after_step`` by the optimizer's own hooks, so that nobody forgets.

    Every forward in training mode between two steps counts, so gradient accumulation works by itself. Do not call
    ``after_step`` as well: the selection biases would move twice.

    Raises:
        UserError: no MoE layer; the model is attached already.

    >>> from spectralmoe import Balanced, FeedForward, LinearScorer, MoE
    >>> layer = MoE(Router(LinearScorer(8, 4), Balanced(2)), FeedForward(4, 8, 16))
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> attachment = attach(optimizer, layer)
    >>> layer(torch.randn(9, 8)).square().mean().backward()  # 18 choices: never the same for 4 experts
    >>> optimizer.step()
    >>> bool(layer.router.selector.bias.any())
    True
    """
    return Attachment(optimizer, model, group)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups: decayed, and not decayed (bases on a manifold; biases, other vectors and scalars).

    Decay would shrink a basis that the retraction restores each step, which changes nothing but the momentum. The
    stacked biases of experts, (E, H), count as vectors.
    """
    bases = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, Router)
        for name, parameter in module.scorer.named_parameters()
        if name in module.scorer.manifold
    }
    kept: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        vector = parameter.dim() <= 1 or name.endswith("bias")
        if parameter.requires_grad:
            (exempt if vector or id(parameter) in bases else kept).append(parameter)
    return [{"params": kept, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def _records(layers: dict[str, Recordable], tapes: Sequence[Tape]) -> list[Record]:
    """All records of ``tapes``; a tape of another model would silently count nothing."""
    records = [item for tape in tapes for item in tape.records]
    own = {id(layer) for layer in layers.values()}
    for item in records:
        if id(item.layer) not in own:
            raise UserError(f"the tape was recorded on another model: its layer {item.name!r} is not in this one")
    return records


def _before(layers: dict[str, Recordable], records: Sequence[Record]) -> None:
    for layer in layers.values():
        if layer.router is not None:
            layer.router.scorer.before_step([item for item in records if item.layer is layer])


@torch.no_grad()
def _after(layers: dict[str, Recordable], records: Sequence[Record], group: Any) -> None:
    routed = [(layer, layer.router) for layer in layers.values() if layer.router is not None]
    own = [[item for item in records if item.layer is layer] for layer, _ in routed]
    counts = [_counts(router, items) for (_, router), items in zip(routed, own, strict=True)]
    statistics = [router.scorer.statistics(items) for (_, router), items in zip(routed, own, strict=True)]
    streaming = [(router, found) for (_, router), found in zip(routed, statistics, strict=True) if found is not None]
    for (router, _), total in zip(streaming, _summed([found for _, found in streaming], group), strict=True):
        router.scorer.update(total)
    for (_, router), items in zip(routed, own, strict=True):
        router.scorer.after_step(items)
    for (_, router), items, total in zip(routed, own, _summed(counts, group), strict=True):
        if not items or any(item.training for item in items):  # a frozen layer, in evaluation mode, stays as it is
            router.selector.update(total)


def _counts(router: Router, records: Sequence[Record]) -> Tensor:
    counts = torch.zeros(router.num_experts, dtype=torch.int64, device=_device(router))
    return counts + sum((item.routing.load_counts() for item in records if item.training), start=counts)


def _summed(totals: list[Tensor], group: Any) -> list[Tensor]:
    """The tensors of all layers, summed over the ranks in one call."""
    if not totals or not (dist.is_available() and dist.is_initialized()):
        return totals
    flat = torch.cat([total.flatten() for total in totals])
    dist.all_reduce(flat, group=group)
    parts = flat.split([total.numel() for total in totals])
    return [part.view_as(total) for part, total in zip(parts, totals, strict=True)]


def _device(router: Router) -> torch.device:
    return next(router.parameters()).device

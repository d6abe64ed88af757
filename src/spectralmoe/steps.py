"""The work around an optimizer step: retractions, streaming statistics, selection bias, parameter groups."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from spectralmoe.errors import UserError
from spectralmoe.layers import moe_layers, plain_name
from spectralmoe.movement import after, device_of, parallel_of, refuse_join
from spectralmoe.parts import Part
from spectralmoe.recording import Recordable
from spectralmoe.tape import Record, Tape

__all__ = ["Attachment", "after_step", "attach", "param_groups"]


def after_step(model: nn.Module, *tapes: Tape, group: Any = None) -> None:
    """Call after ``optimizer.step()``: retracts bases, refreshes statistics, moves selection biases.

    A frozen router (none of its parameters takes a gradient) stays as it is, bit by bit. In evaluation mode biases and
    statistics rest. Biases move by the router's own choices alone: a replayed forward moves none.

    Args:
        tapes: the tape of this step, or one for each micro-batch under gradient accumulation.
        group: process group over which the int64 counts are summed; None: the default group, where
            ``torch.distributed`` is initialised. Every rank must call.

    Raises:
        UserError: a tape of another model; an empty tape; inside torch's ``Join``, where other ranks may not call.
    """
    layers = moe_layers(model)
    refuse_join(parallel_of(model), "by hooks: with Join([model, attach(optimizer, model)])")
    after(layers, _records(layers, tapes), group)


class Attachment(Joinable):
    """What ``attach`` returns; ``remove()`` undoes it, for all optimizers of the model."""

    def __init__(self, model: nn.Module, group: Any) -> None:
        super().__init__()
        self.layers, self.group = moe_layers(model), group
        self._parallel = parallel_of(model)
        self._handles: dict[int, tuple[RemovableHandle, RemovableHandle]] = {}
        self._held: dict[int, weakref.ref[Optimizer]] = {}
        self._stepped: set[int] = set()
        self._records: tuple[Record, ...] = ()
        self._checked = self._uneven = False
        self._tape = Tape(self.layers, training_only=True, attachment=weakref.ref(self))
        self._tape.open()

    def __del__(self) -> None:
        if hasattr(self, "_tape"):
            self._tape.seal()

    def add(self, optimizer: Optimizer) -> None:
        """Hook one more optimizer; the work is done after the last of them has stepped."""
        key, name = id(optimizer), type(optimizer).__name__
        if key in self._handles:
            raise UserError(f"attach: this {name} is attached to this model already; remove() that attachment first")
        try:
            hooks = (
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            )
        except AttributeError:
            raise UserError(f"attach: {name} is a wrapper without hooks; attach the optimizer inside it") from None
        self._handles[key], self._held[key] = hooks, weakref.ref(optimizer)
        self._checked = False
        weakref.finalize(optimizer, _forget, weakref.ref(self), key).atexit = False

    def remove(self) -> None:
        """Stop recording and take the hooks off the optimizers."""
        self._tape.seal()
        for hook in chain.from_iterable(self._handles.values()):
            hook.remove()
        self._handles.clear()

    def join_hook(self, **_: Any) -> JoinHook:
        """For torch's ``Join``: a rank without inputs takes part in the sums of the others."""
        self._uneven = True
        return _Shadow(self)

    @property
    def join_device(self) -> torch.device:
        """Where the sums over the ranks are made."""
        return next((device_of(layer) for layer in self.layers.values()), torch.device("cpu"))

    @property
    def join_process_group(self) -> Any:
        """The ranks that are summed over."""
        return dist.group.WORLD if self.group is None else self.group

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        fresh = self._tape.drain()
        if self._stepped and (fresh or id(optimizer) in self._stepped):
            self._finish()  # the other optimizers left this step out
        if not self._stepped:
            self._check()
            Join.notify_join_context(self)
        self._records += fresh

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._records += self._tape.drain()  # forwards of a closure
        self._stepped.add(id(optimizer))
        if self._stepped >= self._handles.keys():
            self._finish()
        else:
            for part in (part for layer in self.layers.values() for _, part in layer.parts()):
                part.retract(trained_only=True)

    def _finish(self) -> None:
        records, self._records, self._stepped = self._records, (), set()
        calls = Counter(id(item.layer) for item in records)
        if self._uneven and min(calls.values(), default=0) > 1:
            raise UserError("Join: several forwards before one step do not work with uneven inputs; step after each")
        after(self.layers, records, self.group)

    def _check(self) -> None:
        """Refuse what would go wrong in silence, or stop the processes."""
        if not self._join_config.enable:
            refuse_join(self._parallel, "with Join([model, attach(optimizer, model)])")
        elif self._uneven and self._join_config.is_first_joinable and self._parallel is not None:
            raise UserError("Join: name the model before what attach returned: Join([model, attachment])")
        if self._checked:
            return
        moved = {id(p) for ref in self._held.values() if (one := ref()) for g in one.param_groups for p in g["params"]}
        for path, layer in self.layers.items():
            for where, part in layer.parts():
                bases = {name: getattr(part, name) for name in part.manifold}
                for name in (name for name, basis in bases.items() if basis.requires_grad and id(basis) not in moved):
                    raise UserError(
                        f"attach: {plain_name(f'{path}.{where}.{name}')} is trained by no optimizer that is attached; "
                        "name all optimizers of the model, attach([one, other], model), or freeze it with "
                        "requires_grad_(False)"
                    )
        self._checked = True


class _Shadow(JoinHook):
    """What a rank that has no inputs left does for each step of the others."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def main_hook(self) -> None:
        """Take part in their sums, with nothing of its own."""
        after(self.attachment.layers, (), self.attachment.group)

    def post_hook(self, is_last_joiner: bool) -> None:
        """All ranks are through."""
        self.attachment._uneven = False


def _forget(reference: weakref.ref[Attachment], key: int) -> None:
    """An attached optimizer is gone."""
    if (attachment := reference()) is not None:
        attachment._handles.pop(key, None)
        attachment._held.pop(key, None)
        attachment._stepped.discard(key)
        if not attachment._handles:
            attachment.remove()


def attach(optimizers: Optimizer | Iterable[Optimizer], model: nn.Module, *, group: Any = None) -> Attachment:
    """Do ``after_step`` by the optimizers' own hooks, so that nobody forgets.

    Every forward in training mode between two steps counts, so gradient accumulation works by itself, and so do
    closures, schedulers and steps that a gradient scaler leaves out. Do not call ``after_step`` as well: the selection
    biases would move twice.

    Where several optimizers share a model (Muon for matrices, AdamW for the rest), name them all, at once or one call
    after the other: bases are retracted after each step, and the rest is done after the last of them has stepped, in
    whatever order. With uneven inputs under ``DistributedDataParallel`` what this returns goes into torch's ``Join``,
    behind the model: ``Join([model, attachment])``.

    Args:
        optimizers: one, or all that train ``model``.

    Raises:
        UserError: no MoE layer; not an optimizer; one that is attached to this model already; a part of the model that
            is attached by itself. At a step: a basis that no attached optimizer trains; a ``Join`` without this.

    >>> from spectralmoe import Balanced, FeedForward, LinearScorer, MoE, Router
    >>> layer = MoE(Router(LinearScorer(2, 3), Balanced(1, normalize=False)), FeedForward(3, 2, 4))
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> attachment = attach(optimizer, layer)
    >>> layer(torch.ones(10, 2)).square().mean().backward()
    >>> optimizer.step()
    >>> sorted(round(b, 4) for b in layer.router.selector.bias.tolist())  # all tokens went to one of three
    [-0.001, 0.001, 0.001]
    """
    chosen = [optimizers] if isinstance(optimizers, Optimizer | nn.Module) else list(optimizers)
    for optimizer in chosen:
        if not isinstance(optimizer, Optimizer):
            raise UserError(f"attach: takes torch optimizers, then the model; got a {type(optimizer).__name__}")
    attachment = _attachment_of(model, group) or Attachment(model, group)
    for optimizer in chosen:
        attachment.add(optimizer)
    return attachment


def _attachment_of(model: nn.Module, group: Any) -> Attachment | None:
    """The attachment that this model has already."""
    layers = {id(layer): layer for layer in moe_layers(model).values()}
    references = {sink.attachment for layer in layers.values() for sink in layer.watching if sink.attachment}
    attachment: Attachment
    for attachment in filter(None, (reference() for reference in references)):
        if {id(layer) for layer in attachment.layers.values()} != layers.keys() or attachment.group is not group:
            raise UserError("attach: a layer is attached with another model or group; remove() that attachment first")
        return attachment
    return None


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups: decayed, and not decayed (bases on a manifold; biases, other vectors and scalars).

    Decay would shrink a basis that the retraction restores each step, which changes nothing but the momentum. The
    stacked biases of experts, (E, H), count as vectors.
    """
    bases = {
        id(getattr(module, name)) for module in model.modules() if isinstance(module, Part) for name in module.manifold
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
    known = {id(layer) for layer in layers.values()}
    for item in records:
        if id(item.layer) not in known:
            raise UserError(f"the tape was recorded on another model: its layer {item.name!r} is not in this one")
    return records

"""The work after an optimizer step: bases, running statistics and selection biases; and parameter groups."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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
    """Do the work of MoE layers after ``optimizer.step()``; call it then, or let ``attach`` do it.

    It makes bases orthonormal again, updates running statistics and moves selection biases. A frozen router (none of
    its parameters takes a gradient) stays as it is. Forwards in evaluation mode, and replayed choices, move no bias.

    Args:
        model: the model that was trained.
        tapes: the tape of this step (``record``); under gradient accumulation one for each micro-batch.
        group: the process group over which statistics are summed; None is the default group, if ``torch.distributed``
            is initialised. Every rank must call.

    Raises:
        UserError: a tape is empty or was recorded on another model; or it is called inside torch's ``Join``, where
            other ranks may not call.

    >>> from spectralmoe import Balanced, FeedForward, LinearScorer, MoE, Router, record
    >>> layer = MoE(Router(LinearScorer(2, 3), Balanced(1, normalize=False)), FeedForward(3, 2, 4))
    >>> with record(layer) as tape:
    ...     y = layer(torch.ones(10, 2))
    >>> after_step(layer, tape)
    >>> sorted(round(b, 4) for b in layer.router.selector.bias.tolist())  # all tokens went to one of three
    [-0.001, 0.001, 0.001]
    """
    layers = moe_layers(model)
    refuse_join(parallel_of(model), "by hooks: with Join([model, attach(optimizer, model)])")
    after(layers, _records(layers, tapes), group)


class Attachment(Joinable):
    """What ``attach`` returns: the hooks on the optimizers of a model; ``remove()`` takes them all off."""

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

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if hasattr(self, "_tape") and not finalizing():  # at exit modules are gone, this one's names with them
            self._tape.seal()

    def add(self, optimizer: Optimizer) -> None:
        """Hook one more optimizer; the work is then done after the last of them has stepped.

        Raises:
            UserError: the optimizer is hooked already, or is a wrapper without hooks.
        """
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
        """Return the hook by which torch's ``Join`` lets a rank without inputs take part in the sums of the others."""
        self._uneven = True
        return _Shadow(self)

    @property
    def join_device(self) -> torch.device:
        """The device on which the sums over the ranks are computed."""
        return next((device_of(layer) for layer in self.layers.values()), torch.device("cpu"))

    @property
    def join_process_group(self) -> Any:
        """The process group over which sums are computed."""
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
        """Refuse settings that would give wrong results without an error, or make processes hang."""
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
    """Takes part in each step of the other ranks for a rank that has no inputs left."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def main_hook(self) -> None:
        """Take part in the sums of the other ranks, with zeros."""
        after(self.attachment.layers, (), self.attachment.group)

    def post_hook(self, is_last_joiner: bool) -> None:
        """Note that all ranks have ended."""
        self.attachment._uneven = False


def _forget(reference: weakref.ref[Attachment], key: int) -> None:
    """Remove an attached optimizer that was deleted."""
    if (attachment := reference()) is not None:
        attachment._handles.pop(key, None)
        attachment._held.pop(key, None)
        attachment._stepped.discard(key)
        if not attachment._handles:
            attachment.remove()


def attach(optimizers: Optimizer | Iterable[Optimizer], model: nn.Module, *, group: Any = None) -> Attachment:
    """Do the work of ``after_step`` automatically after each optimizer step, by hooks of the optimizers.

    All forwards in training mode since the last step count, so gradient accumulation needs no extra code, nor do
    closures, schedulers and steps that a gradient scaler skips. Do not call ``after_step`` as well, because selection
    biases would move twice.

    If several optimizers train a model (Muon for matrices, AdamW for the rest), attach all of them, in one call or
    several. Bases are made orthonormal after each optimizer's step, and the rest is done after the last has stepped. If
    ranks have uneven inputs under ``DistributedDataParallel``, give what this returns to torch's ``Join``, behind the
    model: ``Join([model, attachment])``.

    Args:
        optimizers: the optimizer, or all optimizers, that train ``model``.
        model: the model.
        group: the process group over which statistics are summed, as in ``after_step``.

    Raises:
        UserError: the model has no MoE layer; something is no optimizer, or is attached to this model already; a part
            of the model is attached by itself. At a step: a basis is trained by no attached optimizer; or ``Join`` is
            used without the attachment.

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
    """Return two parameter groups for an optimizer: one with weight decay, one without.

    The second holds vectors, scalars, biases (also the stacked biases (E, H) of experts) and orthonormal bases. Decay
    would shrink a basis that is made orthonormal again after each step.

    Args:
        weight_decay: the decay of the first group.

    >>> from spectralmoe import EigenbasisScorer, Router, TopK
    >>> decayed, others = param_groups(Router(EigenbasisScorer(8, 4, rank=3), TopK(2)), weight_decay=0.1)
    >>> [tuple(p.shape) for p in decayed["params"]], [tuple(p.shape) for p in others["params"]]
    ([(3, 4)], [(8, 3), (3,), (4,)])
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
            raise UserError(
                f"the tape was recorded on another model: its layer {item.name!r} is not in this one; pass this "
                "model's tape"
            )
    return records

"""Watch the routers of a Hugging Face model: what they read and returned, as the model ran it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spectralmoe.diagnostics.watch import Seen, Watch, seen_of
from spectralmoe.hf.frames import Frame, Frames
from spectralmoe.hf.layer import HFLayer
from spectralmoe.hf.layers import find_layers, refuse_shared
from spectralmoe.recording import Recordable, recomputing
from spectralmoe.routing import Routing
from spectralmoe.tape import Tape

__all__ = ["watch_transformers"]


@dataclass(frozen=True, slots=True)
class _Call:
    returned: Any
    tokens: Tensor
    frame: Frame
    given: dict[str, Any]
    flat: bool


class _HFWatch(Watch):
    """Stores the inputs and outputs of routers in a list; ``drain`` evaluates them, so a training step stays cheap."""

    def __init__(self, model: nn.Module, tokens: bool, training_only: bool) -> None:
        self.keep_tokens, self.training_only = tokens, training_only
        self.layers: list[HFLayer] = find_layers(model)
        self.calls: list[list[_Call]] = [[] for _ in self.layers]
        self.frames = Frames(model, self.layers)
        self.handles: list[RemovableHandle] = []
        refuse_shared(self.layers)
        ours = {layer.name: layer.router for layer in self.layers if isinstance(layer.router, Recordable)}
        self.tape = Tape(ours, keep=("tokens",) if tokens and ours else (), training_only=training_only)

    def open(self) -> None:
        """Put the hooks in."""
        self.frames.open()
        self.tape.open()
        for layer, calls in zip(self.layers, self.calls, strict=True):
            if not isinstance(layer.router, Recordable):
                self.handles.append(layer.router.register_forward_hook(self._record(layer, calls), with_kwargs=True))

    def close(self) -> None:
        """Take the hooks out."""
        self.frames.close()
        self.tape.seal()
        for handle in self.handles:
            handle.remove()

    def drain(self) -> list[Seen]:
        """See ``Watch``.

        Raises:
            UserError: a router returned something unknown.
        """
        seen, records = [], self.tape.drain()
        for layer, calls in zip(self.layers, self.calls, strict=True):
            if calls:
                layer.remember(calls[-1].given, calls[-1].flat)
            seen += [
                Seen(layer, _routing(layer, call), call.tokens if self.keep_tokens else call.tokens[:0])
                for call in calls
            ]
            seen += [seen_of(item, layer, self.keep_tokens) for item in records if item.name == layer.name]
            calls.clear()
        return seen

    def _record(self, layer: HFLayer, calls: list[_Call]) -> Any:
        names = list(inspect.signature(layer.router.forward).parameters)

        def hook(router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
            if not recomputing() and (router.training or not self.training_only):
                inputs = {**dict(zip(names, args, strict=False)), **kwargs}
                first = next(name for name, value in inputs.items() if isinstance(value, Tensor))
                tokens = inputs.pop(first).detach()
                frame = self.frames.of(layer, tokens)
                parts = returned if isinstance(returned, tuple | list) else (returned,)
                kept = tuple(map(_detached, parts))
                given = {name: _detached(value) for name, value in inputs.items()}
                calls.append(_Call(kept, tokens.reshape(-1, tokens.shape[-1]), frame, given, tokens.dim() == 2))

        return hook


@contextmanager
def watch_transformers(model: nn.Module, *, tokens: bool = True, training_only: bool = False) -> Iterator[Watch]:
    """Watch the MoE layers of a Hugging Face model, whatever runs it: ``model(...)``, ``generate``, a trainer.

    The hooks change no output and are gone after the block. Padding, by the attention mask that the model was called
    with, has no expert in the routings; recomputation under gradient checkpointing is not seen.

    Args:
        tokens: give what the routers read.
        training_only: leave out the calls of routers that are in evaluation mode.

    Raises:
        UserError: the model holds no MoE layer, or one of a kind that cannot be read; two layers share a router.

    >>> gate = nn.Linear(8, 4)
    >>> gate.forward = lambda x: ((z := x @ gate.weight.T), *z.softmax(-1).topk(2))
    >>> layer = nn.ModuleDict({"gate": gate, "experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(4))})
    >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": layer})])})
    >>> with watch_transformers(model) as seen:
    ...     logits, weights, indices = gate(torch.randn(10, 8))
    >>> call = seen.drain()[0]
    >>> call.layer.name, bool((call.routing.indices == indices).all())
    ('layers.0.mlp', True)
    """
    seen = _HFWatch(model, tokens, training_only)
    seen.open()
    try:
        yield seen
    finally:
        seen.close()


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


@torch.no_grad()
def _routing(layer: HFLayer, call: _Call) -> Routing:
    output = call.returned if len(call.returned) > 1 else call.returned[0]
    return call.frame.put(layer.routing(layer.read(output, call.tokens)))

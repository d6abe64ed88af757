"""Reads the residual stream around MoE layers at the last token: its state before each, and what each added."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectralmoe.diagnostics.watch import Watched
from spectralmoe.errors import UserError
from spectralmoe.hf.frames import stack_around
from spectralmoe.models import LanguageMoE

__all__ = ["Stream", "find_norm", "find_unembed", "slack"]


@dataclass(frozen=True, slots=True)
class Added:
    """The residual stream before a layer at the last token (B, D), and the output that the layer added (B, D)."""

    before: Tensor
    output: Tensor


class Stream:
    """Reads the residual stream of a model by hooks, while it is open.

    Args:
        model: the model.
        layers: layers of a ``Watch``; the block of each adds its output to what the norm in front of it read.
        norm: the final norm.

    Attributes:
        added: for each layer that ran, by name, the stream before it and its output.
        final: what the final norm read at the last token (B, D).
    """

    def __init__(self, model: nn.Module, layers: Sequence[Watched], norm: nn.Module) -> None:
        self.model, self.layers, self.norm = model, layers, norm
        self.added: dict[str, Added] = {}
        self.final: Tensor | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Read the forwards inside a ``with`` block."""
        paths = {module: path for path, module in self.model.named_modules()}
        with ExitStack() as hooks:
            hooks.callback(self.norm.register_forward_pre_hook(self._ends, with_kwargs=True).remove)
            for watched in self.layers:
                layer: nn.Module = watched.layer  # type: ignore[attr-defined]
                around = _Around(watched.name, self)
                block = self.model.get_submodule(paths[layer].rpartition(".")[0])
                hooks.callback(layer.register_forward_hook(around.ran, with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(around.ended).remove)
                for child in block.children():
                    if child is not layer:
                        hooks.callback(child.register_forward_hook(around.passed, with_kwargs=True).remove)
            yield

    def _ends(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.final = last(_first((*args, *kwargs.values())))


class _Around:
    """The hooks of one layer and of the block around it."""

    def __init__(self, name: str, stream: Stream) -> None:
        self.name, self.stream = name, stream
        self.candidates: list[tuple[Tensor, Tensor]] = []
        self.read: Tensor | None = None
        self.output: Tensor | None = None

    def passed(self, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
        """Note the input and output of another part of the block."""
        given, made = _first((*args, *kwargs.values())), _first(returned)
        if given is not None and made is not None:
            self.candidates.append((given, made))

    def ran(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
        """Note the input and output of the layer."""
        self.read, self.output = _first((*args, *kwargs.values())), _first(returned)

    def ended(self, block: nn.Module, args: Any, returned: Any) -> None:
        """Find the stream that the layer's output was added to: the input of the layer's norm, or of the layer."""
        after, read, output = _first(returned), self.read, self.output
        if after is None or read is None or output is None or self.name in self.stream.added:
            raise UserError(f"attribute_experts: the block around {self.name} cannot be read")
        before = [given for given, made in self.candidates if made.data_ptr() == read.data_ptr()]
        for given in (*before, read):
            if given.shape == after.shape and output.numel() == after.numel():
                found = Added(last(given), last(output.view_as(after)))
                if _adds_up(found, last(after), slack(after.dtype)):
                    self.stream.added[self.name] = found
        self.candidates, self.read, self.output = [], None, None
        if self.name not in self.stream.added:
            raise UserError(
                f"attribute_experts: the block around {self.name} ({type(block).__name__}) does not add the layer's "
                "output to the residual stream as it is, so a gain of an expert has no meaning there"
            )


def _adds_up(found: Added, after: Tensor, rounding: float) -> bool:
    """Whether both parts are what came out, coordinate by coordinate: a few are often much larger than the rest."""
    off = (found.before + found.output - after).abs()
    return bool((off <= rounding * (found.before.abs() + found.output.abs()) + 1e-9).all())


def slack(dtype: torch.dtype) -> float:
    """Return the relative error that sums in this precision may have."""
    return 1e-5 + 8 * torch.finfo(dtype).eps


def last(states: Tensor | None) -> Tensor:
    """Return the state of the last token of each sequence (B, S, D): (B, D), in fp32 or float64."""
    if states is None or states.dim() != 3:
        raise UserError("attribute_experts: the residual stream must be (B, S, D)")
    return states[:, -1].to(torch.promote_types(states.dtype, torch.float32))


def _first(values: Any) -> Tensor | None:
    """The first tensor of what a module takes or returns."""
    parts = values if isinstance(values, tuple | list) else (values,)
    return next((part for part in parts if isinstance(part, Tensor)), None)


def find_norm(model: nn.Module, layers: Sequence[Watched]) -> nn.Module:
    """Find the final norm of a model: the one module beside its numbered layers that holds vectors alone.

    Raises:
        UserError: there is none, or several.
    """
    stack = stack_around(model, {m: p for p, m in model.named_modules()}[layers[0].layer])  # type: ignore[attr-defined]
    vectors = [child for child in stack.children() if {value.dim() for value in child.parameters()} == {1}]
    if len(vectors) != 1:
        raise UserError(
            f"attribute_experts: {type(model).__name__} has {len(vectors) or 'no'} final norms beside its layers; "
            "say which one with norm="
        )
    return vectors[0]


def find_unembed(model: Any) -> Callable[[Tensor], Tensor]:
    """Return the module that maps the normed stream to logits.

    Raises:
        UserError: the model does not say which it is.
    """
    if isinstance(model, LanguageMoE):
        return model.head
    found = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if found is None:
        raise UserError(f"attribute_experts: {type(model).__name__} does not say what makes its logits; give unembed=")
    made: Callable[[Tensor], Tensor] = found
    return made

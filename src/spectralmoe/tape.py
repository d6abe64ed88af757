"""Tapes hold what the MoE layers of a model did, for losses, diagnostics and the work after an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor

from spectralmoe.context import Rows
from spectralmoe.dispatch.base import Kept
from spectralmoe.errors import UserError
from spectralmoe.recording import Recordable, Sink
from spectralmoe.router import Router
from spectralmoe.routing import Routing
from spectralmoe.scorers import Scorer

__all__ = ["EmptyTape", "Record", "Tape", "keeps", "of_model", "said"]


class EmptyTape(UserError):
    """The error of reading a tape that recorded no forward."""


Function = TypeVar("Function", bound=Callable[..., Tensor])


def keeps(*names: str, argument: str = "") -> Callable[[Function], Function]:
    """Decorate a regularizer that reads kept tensors, so that ``record(model, terms=terms)`` keeps them.

    Args:
        names: the names of the tensors.
        argument: the name of an argument of the regularizer; if a ``partial`` sets it, its value is the tensor that is
            kept instead.
    """

    def mark(function: Function) -> Function:
        function.keeps, function.keeps_argument = names, argument  # type: ignore[attr-defined]
        return function

    return mark


def of_model(function: Function) -> Function:
    """Decorate a regularizer that takes the records of all layers at once; a ``Term`` of it has ``scope="model"``."""
    function.scope = "model"  # type: ignore[attr-defined]
    return function


def said(function: Callable[..., Tensor]) -> tuple[tuple[str, ...], Literal["layer", "model"]]:
    """Return the kept tensors that a regularizer reads, and its scope, as its decorators say."""
    given = function.keywords if isinstance(function, partial) else {}
    marked: Any = function.func if isinstance(function, partial) else function
    named = given.get(getattr(marked, "keeps_argument", ""))
    return (named,) if named else getattr(marked, "keeps", ()), getattr(marked, "scope", "layer")


class Needs(Protocol):
    """The attributes of a ``Term`` that a tape reads: a pattern for layer names, and the tensors that these keep."""

    @property
    def layers(self) -> str: ...

    @property
    def keeps(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class Record:
    """The record of one forward of one layer.

    Attributes:
        name: the layer's name in the model, without prefixes of wrappers (DDP, torch.compile, checkpointing).
        layer: the layer.
        routing: what its router decided.
        kept: the tensors of the experts that were asked for with ``record(keep=...)``.
        tokens: what the router read (N, D), padding included. It has a gradient if "tokens" was asked for; in training
            it may be there without, for parts with running statistics. Otherwise None.
        training: whether the layer and its router were in training mode.
        context: the side information that the layer got, by name, one row for each token (N, ...).
    """

    name: str
    layer: Recordable
    routing: Routing
    kept: Kept | None = None
    tokens: Tensor | None = None
    training: bool = True
    context: Rows | None = None

    @property
    def router(self) -> Router | None:
        """The layer's router."""
        return self.layer.router

    @property
    def matrix(self) -> Tensor | None:
        """The scorer's routing matrix as it is now; None if there is none."""
        return self.layer.matrix

    @property
    def scorer(self) -> Scorer | None:
        """The layer's scorer."""
        return None if self.router is None else self.router.scorer

    def tensor(self, name: str) -> Tensor:
        """Return a kept tensor: (M, ...) with rows sorted by expert, whose slots are ``order``; "tokens" is (N, D).

        Raises:
            UserError: the tensor was not kept.
        """
        if name == "tokens" and self.tokens is not None:
            return self.tokens
        if self.kept is None or name not in self.kept.tensors:
            raise UserError(
                f"layer {self.name!r} did not keep {name!r}; open the tape with record(model, keep=({name!r},)), or "
                "with record(model, terms=terms) for a regularizer that reads it"
            )
        return self.kept.filled(self.kept.tensors[name])

    @property
    def input(self) -> Tensor:
        """The inputs of the experts (M, D), if "input" was kept."""
        return self.tensor("input")

    @property
    def hidden(self) -> Tensor:
        """The hidden activations of the experts (M, H), if "hidden" was kept."""
        return self.tensor("hidden")

    @property
    def output(self) -> Tensor:
        """The outputs of the experts (M, D) before the combine weights, if "output" was kept."""
        return self.tensor("output")

    @property
    def order(self) -> Tensor:
        """The flat slot of each kept row, token * K + slot: (M,) int64."""
        if self.kept is None:
            raise UserError(f"layer {self.name!r} kept no tensors; open the tape with record(model, keep=...)")
        return self.kept.filled(self.kept.slots.order)


class Tape:
    """A sequence of records (``Record``), one for each forward of each layer, in the order of layers and then calls.

    ``record`` makes it; use it with ``len``, by index, or in a loop. Recording ends when the tape is first read, and
    when its block ends. A recomputation during backward is not recorded. A tape sees the forwards of its own thread
    alone, unless it is made with ``training_only``.

    Args:
        layers: the layers to record, by name.
        keep, terms: as in ``record``.
        training_only: whether it records forwards in training mode only, and those of all threads.

    Raises:
        UserError: a name to keep is unknown. On reading: no forward was recorded (``EmptyTape``).
    """

    def __init__(
        self,
        layers: Mapping[str, Recordable],
        keep: Sequence[str] = (),
        *,
        terms: Mapping[str, Needs] | None = None,
        training_only: bool = False,
        attachment: Any = None,
    ) -> None:
        self._layers = dict(layers)
        keep, terms = (keep,) if isinstance(keep, str) else tuple(keep), terms or {}
        known = list(dict.fromkeys(name for layer in self._layers.values() for name in layer.keepable))
        for name in keep:
            if name not in known:
                raise UserError(f"record(keep=...): unknown tensor {name!r}; known: {', '.join(known)}")
        for title, term in terms.items():
            for name in term.keeps:
                if name not in known:
                    raise UserError(
                        f"term {title!r} reads {name!r}, which these layers cannot keep; they keep: {', '.join(known)}"
                    )
        self._sinks = {}
        for path in self._layers:
            wanted = [name for term in terms.values() if fnmatch(path, term.layers) for name in term.keeps]
            self._sinks[path] = Sink(tuple(dict.fromkeys([*keep, *wanted])), training_only, attachment)
        self._training_only = training_only
        self._records: tuple[Record, ...] | None = None

    def __enter__(self) -> Tape:
        self.open()
        return self

    def __exit__(self, *error: object) -> None:
        self.seal()

    def open(self) -> None:
        """Start recording."""
        for name, layer in self._layers.items():
            if self._training_only:
                layer.watching = (*layer.watching, self._sinks[name])
            else:
                layer.here.sinks = (*layer.here.sinks, self._sinks[name])

    def seal(self) -> None:
        """Stop recording."""
        for name, layer in self._layers.items():
            if self._training_only:
                layer.watching = tuple(sink for sink in layer.watching if sink is not self._sinks[name])
            else:
                layer.here.sinks = tuple(sink for sink in layer.here.sinks if sink is not self._sinks[name])

    @property
    def records(self) -> tuple[Record, ...]:
        """All records, as a tuple; reading it ends the recording."""
        if self._records is None:
            self.seal()
            self._records = tuple(
                Record(name, self._layers[name], *entry)
                for name, sink in self._sinks.items()
                for entry in sink.entries()
            )
        if not self._records:
            raise EmptyTape(
                "the tape is empty: run the model's forward inside the 'with record(model)' block, in the same thread"
            )
        return self._records

    def drain(self) -> tuple[Record, ...]:
        """Return the records since the last call, possibly none; the tape goes on recording."""
        records = []
        for name, sink in self._sinks.items():
            records += [Record(name, self._layers[name], *entry) for entry in sink.entries()]
            sink.chain = None
        return tuple(records)

    def layer(self, name: str) -> list[Record]:
        """Return the records of one layer, one for each call.

        Raises:
            UserError: the tape holds no layer of this name.
        """
        records = [item for item in self.records if item.name == name]
        if not records:
            names = ", ".join(dict.fromkeys(item.name for item in self.records))
            raise UserError(f"the tape holds no layer {name!r}; it holds: {names}")
        return records

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

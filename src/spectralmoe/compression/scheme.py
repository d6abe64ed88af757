"""The scheme of Replicate-and-Quantize: it chooses the experts to copy and to quantise, and counts the bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor, nn

from spectralmoe.compression.edit import whole_number
from spectralmoe.compression.quantize import checked_bits
from spectralmoe.compression.replicate import replicas_by_load
from spectralmoe.compression.saliency import SALIENCIES
from spectralmoe.errors import one_of

__all__ = ["Held", "LayerReport", "Report", "Scheme"]

Model = TypeVar("Model", bound=nn.Module)

_MOST = 2**16  # places added to a layer


@dataclass(frozen=True, slots=True)
class LayerReport:
    """Says what Replicate-and-Quantize did to the experts of one layer.

    Attributes:
        counts: the load of each expert on the calibration data (E,) int64.
        importance: the importance of each expert (E,) float64; None if it was not needed.
        replicated: the experts that got copies.
        quantised: the experts without copies that were quantised.
        places: how many places each expert has now, copies included; 0 for a zero expert.
        bytes_before, bytes_after: the bytes of the experts' own tensors, copies included. Quantised matrices count as
            packed integers and scales.
    """

    counts: Tensor
    importance: Tensor | None
    replicated: tuple[int, ...]
    quantised: tuple[int, ...]
    places: tuple[int, ...]
    bytes_before: int
    bytes_after: int

    @property
    def imbalance_before(self) -> float:
        """The largest load of an expert over the mean load, without zero experts."""
        loads: list[int] = [count for count, number in zip(self.counts.tolist(), self.places, strict=True) if number]
        return len(loads) * max(loads) / max(sum(loads), 1)

    @property
    def imbalance_after(self) -> float:
        """The largest load of a place over the mean load, if the places of an expert share its load evenly."""
        counts: list[int] = self.counts.tolist()
        held = [(count, number) for count, number in zip(counts, self.places, strict=True) if number]
        busiest, total = max(-(-count // number) for count, number in held), sum(count for count, _ in held)
        return sum(self.places) * busiest / max(total, 1)


@dataclass(frozen=True, slots=True)
class Report(Generic[Model]):
    """What ``replicate_and_quantize`` returns.

    Attributes:
        model: the new model.
        layers: layer name -> what was done to it.
    """

    model: Model
    layers: dict[str, LayerReport]

    @property
    def bytes_before(self) -> int:
        """The bytes of the routed experts of all layers, before."""
        return sum(layer.bytes_before for layer in self.layers.values())

    @property
    def bytes_after(self) -> int:
        """The bytes of the routed experts of all layers, after, copies included."""
        return sum(layer.bytes_after for layer in self.layers.values())


@dataclass(frozen=True, slots=True)
class Held:
    """Says how many copies of each expert a layer holds, and how many bytes they take.

    Attributes:
        places: how many places each expert has.
        full, low: the bytes of one place, as it is and quantised; 0 for a zero expert.
    """

    places: Sequence[int]
    full: Sequence[int]
    low: Sequence[int]


@dataclass(frozen=True, slots=True)
class Scheme:
    """The settings of Replicate-and-Quantize, and the choice of experts that follows from them.

    Attributes:
        owner: the name of the calling function, for error messages.
        importance, bits, copies, quantize, keep_original: as in ``replicate_and_quantize``.

    Raises:
        UserError: a number is out of range, or the importance is unknown.

    >>> import torch
    >>> scheme = Scheme("example", copies=1, quantize=1)
    >>> held = Held([1, 1, 1], [400] * 3, [110] * 3)
    >>> done = scheme.applied("", held, torch.tensor([90, 20, 10]), lambda: torch.tensor([0.0, 3.0, 2.0]))
    >>> done.replicated, done.quantised, done.places, done.bytes_before, done.bytes_after
    ((0,), (2,), (2, 1, 1), 1200, 730)
    >>> scheme.low(done, held, [[0, 3], [1], [2]])
    {0, 2, 3}
    """

    owner: str
    importance: str = "removal"
    bits: int = 8
    copies: int = 1
    quantize: int = 1
    keep_original: bool = False

    def __post_init__(self) -> None:
        checked_bits(self.owner, self.bits)
        whole_number(self.owner, "copies", self.copies, 0, _MOST)
        whole_number(self.owner, "quantize", self.quantize, 0, _MOST)
        if self.importance not in (*SALIENCIES, "wanda"):
            raise one_of("importance", self.importance, (*SALIENCIES, "wanda"))

    def applied(self, name: str, held: Held, counts: Tensor, importance: Callable[[], Tensor]) -> LayerReport:
        """Choose the experts of layer ``name`` to copy and to quantise, given their load ``counts`` (E,).

        Args:
            importance: a function that returns the importance of each expert (E,); it is called only if needed.

        Raises:
            UserError: more experts shall be quantised than there are without copies.
        """
        before = held.places
        after = replicas_by_load(counts, before, self.copies)
        replicated = [e for e, number in enumerate(before) if after[e] > number]
        others = [e for e, number in enumerate(before) if number and after[e] == number]
        most = len(others)
        what = f"quantize, of the {most} experts of layer {name!r} without copies,"
        whole_number(self.owner, what, self.quantize, 0, most)
        values = importance() if 0 < self.quantize < most else None
        ranked = others if values is None else sorted(others, key=lambda e: float(values[e]))  # of equal ones the first
        least = sorted(ranked[: self.quantize])
        total = 0
        for e, number in enumerate(after):
            low = number if e in least or e in replicated else 0
            low -= before[e] if e in replicated and self.keep_original else 0
            total += (number - low) * held.full[e] + low * held.low[e]
        whole = sum(number * size for number, size in zip(before, held.full, strict=True))
        return LayerReport(counts, values, tuple(replicated), tuple(least), tuple(after), whole, total)

    def low(self, done: LayerReport, held: Held, places: Sequence[Sequence[int]]) -> set[int]:
        """Return the places to quantise, given those of each expert now, copies behind the originals."""
        low = {place for e in done.quantised for place in places[e]}
        for e in done.replicated:
            low |= set(places[e][held.places[e] if self.keep_original else 0 :])
        return low

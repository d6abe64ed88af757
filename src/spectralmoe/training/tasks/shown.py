"""What verbs show of a trained network: results for files and people, and held-out samples to look at routers with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from spectralmoe.instruments.samples import Place

__all__ = ["HeldOut", "Predictions", "Running", "Shown"]


@dataclass(frozen=True, slots=True)
class Shown:
    """A result as JSON values, and as text for people."""

    values: dict[str, Any]
    text: str


class Predictions(NamedTuple):
    """The predictions of a network for each input, and notes on how the inputs were read."""

    results: Sequence[Shown]
    notes: Sequence[str] = ()


class Running(NamedTuple):
    """Running text for the page: its title, the sample (1, S), and the text of each of its tokens."""

    title: str
    sample: Tensor
    pieces: Sequence[str]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Samples of the test part, as ``inspect`` runs them.

    Attributes:
        kind: what people call the samples.
        inputs: (N, ...) as the network takes them.
        labels: the class or topic of each sample (N,), or of each of its tokens (N, S).
        names: of the labels; none where there is nothing to compare.
        beside: what the network takes by keyword, a row (N, ...) each.
        describe: number of a sample, place of a token in it -> the token's picture or text, as ``Inspector`` takes it.
        batch: how many samples are run at once.
        tokenizer: how text became tokens; None for other data.
        running: text to colour by expert.
    """

    kind: str
    inputs: Tensor
    labels: Tensor
    names: Sequence[str]
    describe: Callable[[int, Place], dict[str, Any]]
    batch: int = 64
    tokenizer: str | None = None
    running: Sequence[Running] = ()
    beside: Mapping[str, Tensor] = field(default_factory=dict)

"""Suite ``memory``: bytes at the worst moment of a forward and backward, against the limit's own tensors."""

from __future__ import annotations

from collections.abc import Iterator

from spectralmoe.bench.case import Case
from spectralmoe.bench.peers import find_peers
from spectralmoe.bench.problem import Activation, Problem
from spectralmoe.bench.settings import Settings
from spectralmoe.bench.subject import as_case, spectralmoe_layer
from spectralmoe.bench.suites.layer import QUICK, SHAPES

__all__ = ["cases", "count"]


def count(settings: Settings) -> int:
    """How many cases there will be."""
    return 2 * len(QUICK if settings.quick else SHAPES)


def cases(settings: Settings) -> Iterator[Case]:
    """The shapes of ``layer``: weights, input, and the most that a run adds to them."""
    activations: tuple[Activation, ...] = ("gelu", "swiglu")
    for activation in activations:
        for sizes in QUICK if settings.quick else SHAPES:
            problem = Problem(sizes, activation, settings.dtypes[0], settings.device)
            peers, skipped = find_peers(problem)
            subjects = [spectralmoe_layer(problem), spectralmoe_layer(problem, recompute=True), *peers]
            yield as_case("memory", problem, "forward and backward", subjects, skipped, unit="bytes")

"""Suite ``decode``: a forward of few tokens through large experts, as in generation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from spectralmoe.bench.case import Case
from spectralmoe.bench.peers import find_peers
from spectralmoe.bench.problem import Problem, Sizes
from spectralmoe.bench.settings import Settings
from spectralmoe.bench.subject import as_case, spectralmoe_layer

__all__ = ["SIZES", "cases", "count"]

SIZES = Sizes(1, 1024, 2048, 64, 2)
QUICK = Sizes(1, 64, 128, 16, 2)
TOKENS = (1, 4, 16, 64)
BATCHES = 16
GATED = ("naive", "transformers", "torchtitan", "megablocks", "scattermoe")


def count(settings: Settings) -> int:
    """How many cases there will be."""
    return len(settings.dtypes) * len(TOKENS)


def cases(settings: Settings) -> Iterator[Case]:
    """1 to 64 tokens at a time, other tokens at each call, so that the chosen experts are not in the cache already."""
    sizes = QUICK if settings.quick else SIZES
    for dtype in settings.dtypes:
        whole = Problem(sizes, "swiglu", dtype, settings.device)
        for n in TOKENS:
            problem = Problem(replace(sizes, n=n), "swiglu", dtype, settings.device, batches=BATCHES, weights=whole)
            peers, skipped = find_peers(problem, *GATED)
            subjects = [spectralmoe_layer(problem), *peers]
            yield as_case("decode", problem, "forward", subjects, skipped, quick=settings.quick)

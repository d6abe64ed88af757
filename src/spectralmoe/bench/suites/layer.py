"""Suite ``layer``: a whole MoE layer against the arithmetic in it and against other libraries' layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from spectralmoe.bench.case import Case
from spectralmoe.bench.peers import find_peers
from spectralmoe.bench.problem import Activation, Form, Problem, Sizes
from spectralmoe.bench.settings import Settings
from spectralmoe.bench.subject import Subject, as_case, spectralmoe_layer

__all__ = ["FORMS", "SHAPES", "cases", "count"]

SHAPES = (
    Sizes(4096, 256, 1024, 8, 2),
    Sizes(2048, 512, 1024, 32, 4),
    Sizes(4096, 256, 1024, 64, 2),
    Sizes(8192, 128, 256, 128, 4),
)
QUICK = (Sizes(512, 64, 128, 8, 2), Sizes(1024, 32, 64, 32, 4))
BATCHES = 64
FORMS: tuple[Form, ...] = ("forward and backward", "forward")


def count(settings: Settings) -> int:
    """How many cases there will be."""
    return (1 + len(settings.dtypes)) * len(QUICK if settings.quick else SHAPES) * len(FORMS)


def cases(settings: Settings) -> Iterator[Case]:
    """GELU in the first dtype, also compiled and recomputing; SwiGLU (the experts of most peers) in all.

    Other tokens in every run, as in training: in 16 bits a CPU compiles a kernel for every load that it has not met
    lately, and keeps a thousand of them.
    """
    kinds: list[tuple[Activation, torch.dtype]] = [("gelu", settings.dtypes[0])]
    kinds += [("swiglu", dtype) for dtype in settings.dtypes]
    for activation, dtype in kinds:
        for sizes in QUICK if settings.quick else SHAPES:
            problem = Problem(sizes, activation, dtype, settings.device, batches=BATCHES)
            peers, skipped = find_peers(problem)
            for form in FORMS:
                subjects = [spectralmoe_layer(problem), *_variants(problem, form, settings), *peers]
                yield as_case("layer", problem, form, subjects, skipped, quick=settings.quick)


def _variants(problem: Problem, form: Form, settings: Settings) -> Iterator[Subject]:
    if problem.activation == "gelu" and not settings.quick:
        yield spectralmoe_layer(problem, compiled=True)
        if form != "forward":
            yield spectralmoe_layer(problem, recompute=True)

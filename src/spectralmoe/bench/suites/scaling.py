"""Suite ``scaling``: how the time of a token changes as E, N, D or k grows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from spectralmoe.bench.case import Candidate, Case
from spectralmoe.bench.gate import difference
from spectralmoe.bench.limit import IdealLayer
from spectralmoe.bench.problem import Problem, Sizes, dtype_name
from spectralmoe.bench.settings import Settings
from spectralmoe.bench.subject import as_case, bank, candidate, spectralmoe_layer
from spectralmoe.dispatch import pick_dispatch
from spectralmoe.experts import Experts

__all__ = ["BASE", "cases", "count", "dispatch_name", "whole_name"]

BASE, QUICK = Sizes(16384, 256, 128, 8, 2), Sizes(512, 32, 32, 4, 2)
EXPERTS, QUICK_EXPERTS = (8, 64, 256, 1024), (4, 16)
GROWING = {"n": (512, 2048, 8192, 32768), "d": (128, 256, 512, 1024), "k": (1, 2, 4, 8)}
MIDDLE = Sizes(4096, 256, 512, 32, 2)


def dispatch_name(sizes: Sizes, dtype: torch.dtype) -> str:
    """Of the case of dispatch and experts with a given routing, over E."""
    return f"dispatch and experts, N{sizes.n} D{sizes.d} H{sizes.h} k{sizes.k} {dtype_name(dtype)} forward"


def whole_name(sizes: Sizes, dtype: torch.dtype) -> str:
    """Of the case of a whole layer against all of its arithmetic."""
    return f"whole layer, {sizes} {dtype_name(dtype)} forward"


def count(settings: Settings) -> int:
    """How many cases there will be."""
    return 1 + len(QUICK_EXPERTS) if settings.quick else 1 + len(EXPERTS) + sum(map(len, GROWING.values()))


def cases(settings: Settings) -> Iterator[Case]:
    """E from 8 to 1024 in evaluation; then N, D and k in training."""
    base, experts = (QUICK, QUICK_EXPERTS) if settings.quick else (BASE, EXPERTS)
    problems = [Problem(replace(base, e=e), "gelu", settings.dtypes[0], settings.device) for e in experts]
    yield _dispatch(problems, base)
    for problem in problems:
        yield _whole(problem)
    del problems
    for letter, values in {} if settings.quick else GROWING.items():
        for value in values:
            problem = Problem(replace(MIDDLE, **{letter: value}), "gelu", settings.dtypes[0], settings.device)
            case = as_case("scaling", problem, "forward and backward", [spectralmoe_layer(problem)])
            yield replace(case, name=f"over {letter.upper() if letter != 'k' else letter}, {case.name}")


def _dispatch(problems: list[Problem], base: Sizes) -> Case:
    """Dispatch and experts alone: N is the same for all, so the ratio of two times is that of the time of a token."""
    ours, floors = [], []
    for problem in problems:
        e, flops = problem.sizes.e, problem.flops("forward")
        run = partial(_given_routing, problem, bank(problem))
        ours.append(Candidate(f"E = {e}", run, "ours", check=partial(_check, problem, run), flops=flops))
        floor = IdealLayer(problem, "bmm").forward
        floors.append(Candidate(f"balanced bmm, E = {e}", floor, "unlike", flops=flops, note="the GEMMs alone"))
    return Case(
        "scaling", dispatch_name(base, problems[0].dtype), [*ours, *floors], problems[0].device, baseline=ours[0].name
    )


@torch.no_grad()
def _given_routing(problem: Problem, experts: Experts) -> Tensor:
    return pick_dispatch(problem.routing, experts)(problem.x, problem.routing, experts)


def _check(problem: Problem, run: Callable[[], Tensor]) -> str | None:
    return difference({"output": run()}, problem.output, problem.dtype)


def _whole(problem: Problem) -> Case:
    """The layer against logits GEMM, top-k and balanced GEMMs."""
    limits = []
    for how in ("bmm", "mm"):
        work = partial(_arithmetic, problem, IdealLayer(problem, how))
        limits.append(Candidate(f"logits, top-k, balanced {how}", work, "limit", flops=problem.flops("forward")))
    ours = candidate(spectralmoe_layer(problem), problem, "forward")
    return Case("scaling", whole_name(problem.sizes, problem.dtype), [ours, *limits], problem.device)


def _arithmetic(problem: Problem, balanced: IdealLayer) -> tuple[Tensor, Tensor]:
    best: Tensor = (problem.x.float() @ problem.router.T).topk(problem.sizes.k).values
    return best, balanced.forward()

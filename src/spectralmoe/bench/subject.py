"""Subjects: implementations of a problem's layer, and the candidates that they become."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from spectralmoe.bench.case import Candidate, Case
from spectralmoe.bench.gate import difference
from spectralmoe.bench.limit import IdealLayer, matmul_rate
from spectralmoe.bench.memory_peak import held_bytes
from spectralmoe.bench.problem import Form, Problem
from spectralmoe.dispatch import Grouped
from spectralmoe.experts import FeedForward
from spectralmoe.moe import MoE
from spectralmoe.router import Router
from spectralmoe.scorers import LinearScorer
from spectralmoe.selectors import TopK

__all__ = ["Skipped", "Subject", "as_case", "bank", "candidate", "limits", "spectralmoe_layer"]


@dataclass(frozen=True, slots=True)
class Subject:
    """An implementation of a problem's layer.

    Attributes:
        call: tokens (N, D) -> (N, D), through ``module``.
        gradients: the gradients of the weights by the problem's names ("router", "up", "down"); None for a subject
            that computes something else.
    """

    name: str
    module: nn.Module
    call: Callable[[Tensor], Tensor]
    gradients: Callable[[], dict[str, Tensor | None]] | None
    kind: Literal["ours", "peer", "unlike"] = "peer"
    note: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A subject that cannot take part, and why."""

    name: str
    why: str


def bank(problem: Problem) -> FeedForward:
    """Our experts with the problem's weights, shared."""
    sizes = problem.sizes
    with torch.device("meta"):
        experts = FeedForward(sizes.e, sizes.d, sizes.h, activation=problem.activation)
    experts.up, experts.down = nn.Parameter(problem.up), nn.Parameter(problem.down)
    return experts


def spectralmoe_layer(problem: Problem, *, recompute: bool = False, compiled: bool = False) -> Subject:
    """Our layer: as it comes, keeping nothing of the experts' work for the gradients, or through ``torch.compile``."""
    scorer = LinearScorer(problem.sizes.d, problem.sizes.e)
    scorer.weight = nn.Parameter(problem.router)
    router, experts = Router(scorer, TopK(problem.sizes.k, normalize=problem.sizes.k > 1)), bank(problem)
    layer = MoE(router, experts, dispatch=Grouped(recompute=True) if recompute else "auto")

    def gradients() -> dict[str, Tensor | None]:
        return {"router": scorer.weight.grad, "up": experts.up.grad, "down": experts.down.grad}

    name = "spectralmoe" + ", recomputing" * recompute + ", compiled" * compiled
    return Subject(name, layer, torch.compile(layer, fullgraph=True) if compiled else layer, gradients, "ours")


def candidate(subject: Subject, problem: Problem, form: Form) -> Candidate:
    """A candidate that runs a subject on a problem."""
    parameters, training = list(subject.module.parameters()), form != "forward"

    def reset() -> None:
        for parameter in parameters:
            parameter.grad = None

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        if subject.module.training != training:
            subject.module.train(training)
        if not training:
            with torch.no_grad():
                return x, subject.call(x)
        reset()
        x = x.detach().requires_grad_()
        y = subject.call(x)
        y.backward(problem.gradient)
        return x, y

    def check() -> str | None:
        x, y = run(problem.x)
        gradients = subject.gradients() if training and subject.gradients is not None else {}
        return difference({"output": y, "x": x.grad, **gradients}, problem.truth(form), problem.dtype)

    return Candidate(
        subject.name,
        lambda: run(next(problem.stream)),
        subject.kind,
        check=None if subject.kind == "unlike" else check,
        reset=reset,
        flops=0 if subject.kind == "unlike" else problem.flops(form),
        held=held_bytes(*parameters, problem.x),
        note=subject.note,
    )


def limits(problem: Problem, form: Form) -> list[Candidate]:
    """The arithmetic alone, as bmm and as a loop of mm."""
    candidates = []
    for how in ("bmm", "mm"):
        work = IdealLayer(problem, how)
        run = work.forward if form == "forward" else work.forward_and_backward
        candidates.append(
            Candidate(f"balanced {how}", run, "limit", flops=problem.flops(form), held=held_bytes(*work.operands()))
        )
    return candidates


def as_case(
    suite: str,
    problem: Problem,
    form: Form,
    subjects: Iterable[Subject],
    skipped: Sequence[Skipped] = (),
    *,
    unit: Literal["seconds", "bytes"] = "seconds",
    quick: bool = False,
) -> Case:
    """The subjects and the limit side by side; where time is measured, the large matmul too."""
    candidates = [*(candidate(subject, problem, form) for subject in subjects), *limits(problem, form)]
    if unit == "seconds":
        candidates.append(matmul_rate(problem.dtype, problem.device, 256 if quick else 2048))
    return Case(
        suite,
        problem.title(form),
        candidates,
        problem.device,
        skipped={item.name: item.why for item in skipped},
        unit=unit,
    )

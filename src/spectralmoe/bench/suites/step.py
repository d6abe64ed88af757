"""Suite ``step``: whole training steps of a small stack of MoE layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.bench.case import Candidate, Case, Kind
from spectralmoe.bench.gate import difference
from spectralmoe.bench.peers import find_peers
from spectralmoe.bench.problem import Problem, Sizes, experts_one_by_one, route
from spectralmoe.bench.settings import Settings
from spectralmoe.bench.subject import Subject, spectralmoe_layer
from spectralmoe.recorder import record
from spectralmoe.regularizers.spectral import spectral_penalty
from spectralmoe.steps import after_step, param_groups
from spectralmoe.terms import Term, penalty

__all__ = ["cases", "count"]

SIZES, QUICK = Sizes(4096, 256, 512, 16, 2), Sizes(256, 32, 64, 8, 2)
DEPTH = 4
CHECKED = 64  # tokens of the gate: in a deep stack, rounding may change the choice of one of many
TERMS = {"spectral": Term(spectral_penalty, 1e-2)}


class Stack(nn.Module):
    """z <- z + layer(LayerNorm(z)), DEPTH times."""

    def __init__(self, subjects: list[Subject]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(subject.module for subject in subjects)
        self.calls: list[Callable[[Tensor], Tensor]] = [subject.call for subject in subjects]

    def forward(self, z: Tensor) -> Tensor:
        for call in self.calls:
            z = z + call(F.layer_norm(z, z.shape[-1:]))
        return z


def count(settings: Settings) -> int:
    """How many cases there will be."""
    return 1


def cases(settings: Settings) -> Iterator[Case]:
    """AdamW on the mean square of the output; ours also with everything that belongs to a step."""
    sizes = QUICK if settings.quick else SIZES
    problems = [Problem(sizes, "swiglu", torch.float32, settings.device, seed=seed) for seed in range(DEPTH)]
    peers_and_skipped = [find_peers(problem, "dense", "transformers") for problem in problems]
    named = [
        {s.name: s for s in (spectralmoe_layer(p), *peers)}
        for p, (peers, _) in zip(problems, peers_and_skipped, strict=True)
    ]
    candidates = []
    for name, first in named[0].items():
        if not name.endswith("batched_mm"):
            stack = Stack([_own_copy(subjects[name]) for subjects in named])
            candidates.append(_candidate(name, stack, first.kind, problems))
    recorded = Stack([_own_copy(spectralmoe_layer(problem)) for problem in problems])
    candidates.append(_candidate("spectralmoe, recorded, with spectral terms", recorded, "ours", problems, whole=True))
    skipped = {item.name: item.why for item in peers_and_skipped[0][1]}
    name = f"{DEPTH} layers, {sizes} swiglu float32 step with AdamW"
    yield Case("step", name, candidates, settings.device, skipped=skipped, baseline="spectralmoe")


def _own_copy(subject: Subject) -> Subject:
    """The subject with new parameters, copies that an optimizer may change."""
    for module in subject.module.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    return subject


def _candidate(name: str, stack: Stack, kind: Kind, problems: list[Problem], *, whole: bool = False) -> Candidate:
    x, optimizer = problems[0].x, torch.optim.AdamW(param_groups(stack, 1e-2), lr=1e-4)

    def step() -> None:
        with record(stack) if whole else nullcontext() as tape:
            loss = stack(x).square().mean()
        if tape is not None:
            loss = loss + penalty(tape, TERMS)[0]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if tape is not None:
            after_step(stack, tape)

    def check() -> str | None:
        leaf, twin = x[:CHECKED].detach().requires_grad_(), x[:CHECKED].double().requires_grad_()
        y, right = stack(leaf), _truth(twin, problems)
        y.backward(torch.ones_like(y))
        right.backward(torch.ones_like(right))
        truth: dict[str, Any] = {"output": right.detach(), "input": twin.grad}
        return difference({"output": y, "input": leaf.grad}, truth, torch.float32)

    return Candidate(name, step, kind, check=None if kind == "unlike" else check)


def _truth(z: Tensor, problems: list[Problem]) -> Tensor:
    for p in problems:
        x = F.layer_norm(z, z.shape[-1:])
        z = z + experts_one_by_one(x, route(x, p.router.to(x.dtype), p.sizes.k), p.up, p.down, p.activation)
    return z

"""One student that learns from one teacher, and what became of its units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectralmoe.models import SoftRouted, overlaps, prune_units
from spectralmoe.optim import SphereStep

ARMS = {"joint": ("experts", "routers"), "router frozen": ("experts",), "expert frozen": ("routers",)}
"""Which directions move; amplitudes always do."""
NEAR = 0.9
"""The cosine from which on a direction counts as found."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Of one student: fresh samples in every step."""

    teachers: int = 2
    units: int = 8
    batch: int = 1024
    steps: int = 1500
    tuned_steps: int = 500
    tested: int = 20_000


def learn(
    student: SoftRouted,
    teacher: SoftRouted,
    names: tuple[str, ...],
    lr: float,
    steps: int,
    batch: int,
    watch: Callable[[int], None] = lambda step: None,
) -> None:
    """Projected gradient descent of the squared error; amplitudes take a tenth of the rate."""
    directions = SphereStep([getattr(student, name) for name in names], lr)
    amplitudes = torch.optim.SGD([student.amplitudes], lr / 10)
    for step in range(steps):
        x = torch.randn(batch, student.dim)
        student.zero_grad()
        (student(x) - teacher(x)).square().mean().backward()
        directions.step()
        amplitudes.step()
        watch(step)


def trial(arm: str, dim: int, seed: int, lr: float, budget: Budget, part: int = 0) -> dict[str, float | None]:
    """Steps until all of the teacher's directions are found, and the error whole, pruned, tuned and from new units.

    Args:
        part: other samples and another start: 0 for what is reported, 1 to choose by.
    """
    torch.set_num_threads(1)
    torch.manual_seed(2 * seed + part)
    teacher, student = SoftRouted.teacher(dim, budget.teachers), SoftRouted(dim, budget.units)
    found: dict[str, int] = {}

    def watch(step: int) -> None:
        for name, cosines in overlaps(student, teacher)._asdict().items():
            if name not in found and bool((cosines.amax(0) > NEAR).all()):
                found[name] = step + 1

    learn(student, teacher, ARMS[arm], lr, budget.steps, budget.batch, watch)
    x = torch.randn(budget.tested, dim)
    pruned = prune_units(student, x)
    tuned, fresh = prune_units(student, x, keep=pruned.units), SoftRouted(dim, pruned.units)
    for network in (tuned, fresh):
        learn(network, teacher, ARMS["joint"], lr, budget.tuned_steps, budget.batch)
    experts, routers = (float(cosines.amax(0).mean()) for cosines in overlaps(student, teacher))
    return {
        "steps_experts": found.get("experts"),
        "steps_routers": found.get("routers"),
        "lag": found["routers"] - found["experts"] if len(found) == 2 else None,
        "experts": experts,
        "routers": routers,
        "loss": error(student, teacher, x),
        "units": pruned.units,
        "pruned": error(pruned, teacher, x),
        "tuned": error(tuned, teacher, x),
        "fresh": error(fresh, teacher, x),
    }


@torch.no_grad()
def error(student: SoftRouted, teacher: SoftRouted, x: Tensor) -> float:
    """Mean squared error over the variance of the teacher's outputs."""
    y = teacher(x)
    return float((student(x) - y).square().mean() / y.var())

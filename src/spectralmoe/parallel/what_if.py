"""Compares plans of a recorded load on several devices: plain expert parallelism, replicas, least loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from spectralmoe.errors import UserError
from spectralmoe.parallel.least_loaded import plan_least_loaded
from spectralmoe.parallel.plan import Plan, checked_load, plan_native
from spectralmoe.parallel.replicas import plan_replicas

__all__ = ["compare_plans", "describe_plan", "scaled_load"]


def compare_plans(
    load: Iterable[int], devices: int, *, capacity: float = 1.0, chunk: int = 1024, threshold: float = 1.3
) -> dict[str, Plan]:
    """Make three plans of one load, by name.

    They are ``native`` (``plan_native``), ``replicas`` (``plan_replicas`` with one more expert a device, chosen by this
    load) and ``least_loaded`` (``plan_least_loaded``). The arguments are those of ``plan_least_loaded``.

    Raises:
        UserError: as ``plan_least_loaded``.

    >>> plans = compare_plans([900, 60, 30, 10], 2, chunk=100)
    >>> {name: plan.imbalance() for name, plan in plans.items()}
    {'native': 1.92, 'replicas': 1.02, 'least_loaded': 1.0}
    """
    counts = checked_load(load)
    return {
        "native": plan_native(counts, devices),
        "replicas": plan_replicas(counts, devices),
        "least_loaded": plan_least_loaded(counts, devices, capacity=capacity, chunk=chunk, threshold=threshold),
    }


def describe_plan(plan: Plan) -> dict[str, Any]:
    """Summarise a plan in numbers that JSON can hold.

    Returns:
        ``imbalance``: the busiest device's tokens over the mean; ``busiest``: its tokens; ``copies``: how many experts'
        weights are sent in a step; ``replicas``: how many copies devices hold beyond one an expert; ``forced``: how
        many tokens exceed a capacity.

    >>> describe_plan(plan_native([6, 0, 1, 1], 2))
    {'imbalance': 1.5, 'busiest': 6, 'copies': 0, 'replicas': 0, 'forced': 0}
    """
    return {
        "imbalance": plan.imbalance(),
        "busiest": max(plan.device_load()),
        "copies": len(plan.copies),
        "replicas": sum(len(homes) - 1 for homes in plan.homes),
        "forced": plan.forced,
    }


def scaled_load(load: Iterable[int], total: int) -> list[int]:
    """Scale a recorded load to ``total`` tokens in whole numbers; what rounding leaves goes to the largest remainders.

    Raises:
        UserError: the load has no tokens; or as ``plan_native``.

    >>> scaled_load([2, 1, 0], 10)
    [7, 3, 0]
    """
    counts = checked_load(load)
    recorded = sum(counts)
    if not recorded:
        raise UserError("this load has no tokens, so it cannot be scaled; record one on data")
    scaled = [number * total // recorded for number in counts]
    remainders = sorted(range(len(counts)), key=lambda e: (-(counts[e] * total % recorded), e))
    for e in remainders[: total - sum(scaled)]:
        scaled[e] += 1
    return scaled

"""Random spill: the control of a planner, which moves as much as it does but does not look where."""

from __future__ import annotations

import random
from collections.abc import Iterable

from spectralmoe.parallel.least_loaded import plan_spill
from spectralmoe.parallel.plan import Plan

__all__ = ["plan_random_spill"]


def plan_random_spill(
    load: Iterable[int],
    devices: int,
    *,
    capacity: float = 1.0,
    chunk: int = 1024,
    threshold: float = 1.3,
    seed: int = 0,
) -> Plan:
    """As ``plan_least_loaded``, but each chunk of what does not fit goes to another device that is drawn at random.

    Raises:
        UserError: as ``plan_least_loaded``.

    >>> sum(plan_random_spill([900, 60, 20, 20], 2, chunk=100).device_load())
    1000
    """
    draw = random.Random(seed)

    def drawn(held: list[int], home: int, rest: int, limit: int) -> tuple[int, int]:
        other = draw.randrange(devices - 1)
        return other + (other >= home), min(rest, chunk)

    return plan_spill(load, devices, drawn, capacity=capacity, chunk=chunk, threshold=threshold)

"""Random spill: a control for least-loaded planning, which moves as many tokens to devices drawn at random."""

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
    """Plan as ``plan_least_loaded`` does, but send each chunk of what does not fit to a device drawn at random.

    Args:
        load, devices, capacity, chunk, threshold: as in ``plan_least_loaded``.
        seed: the seed of the draws.

    Raises:
        UserError: as ``plan_least_loaded``.
    """
    draw = random.Random(seed)

    def drawn(held: list[int], home: int, rest: int, limit: int) -> tuple[int, int]:
        other = draw.randrange(devices - 1)
        return other + (other >= home), min(rest, chunk)

    return plan_spill(load, devices, drawn, capacity=capacity, chunk=chunk, threshold=threshold)

"""Random spill: the control of a planner, which moves as much as it does but does not look where."""

from __future__ import annotations

import random
from collections.abc import Iterable

from spectralmoe.parallel.least_loaded import check_chunk, spilled, tokens_a_device
from spectralmoe.parallel.plan import Plan, checked_load, owners

__all__ = ["plan_random_spill"]


def plan_random_spill(
    load: Iterable[int], devices: int, *, capacity: float = 1.0, chunk: int = 1024, seed: int = 0
) -> Plan:
    """As ``plan_least_loaded``, but each chunk of what does not fit goes to another device that is drawn at random.

    Raises:
        UserError: as ``plan_least_loaded``.

    >>> sum(plan_random_spill([900, 60, 20, 20], 2, chunk=100).device_load())
    1000
    """
    check_chunk(chunk)
    counts, draw = checked_load(load), random.Random(seed)
    homes, limit = owners(len(counts), devices), tokens_a_device(sum(counts), devices, capacity)

    def drawn(held: list[int], home: int, rest: int) -> tuple[int, int]:
        other = draw.randrange(devices - 1)
        return other + (other >= home), min(rest, chunk)

    return spilled(counts, homes, devices, limit, drawn)

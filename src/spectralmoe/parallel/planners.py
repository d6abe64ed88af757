"""Planners: functions with their settings that make a plan for every call of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from spectralmoe.parallel.least_loaded import plan_least_loaded
from spectralmoe.parallel.plan import Plan

__all__ = ["LeastLoaded"]


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """Makes plans by ``plan_least_loaded`` with these settings; pass it as the planner of ``parallelize_experts``.

    Attributes:
        capacity, chunk, threshold: as in ``plan_least_loaded``.

    >>> LeastLoaded(chunk=100)([900, 60, 20, 20], 2).device_load()
    [500, 500]
    """

    capacity: float = 1.0
    chunk: int = 1024
    threshold: float = 1.3

    def __call__(self, load: list[int], devices: int) -> Plan:
        return plan_least_loaded(load, devices, capacity=self.capacity, chunk=self.chunk, threshold=self.threshold)

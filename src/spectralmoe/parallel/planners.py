"""Planners: plans with their settings, for every call of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from spectralmoe.parallel.least_loaded import plan_least_loaded
from spectralmoe.parallel.plan import Plan

__all__ = ["LeastLoaded"]


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """``plan_least_loaded`` with these settings, as planner of ``parallelize_experts``.

    >>> LeastLoaded(chunk=100)([900, 60, 20, 20], 2).device_load()
    [500, 500]
    """

    capacity: float = 1.0
    chunk: int = 1024
    threshold: float = 1.3

    def __call__(self, load: list[int], devices: int) -> Plan:
        return plan_least_loaded(load, devices, capacity=self.capacity, chunk=self.chunk, threshold=self.threshold)

"""Bytes at the worst moment of a piece of work."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

__all__ = ["held_bytes", "peak_bytes"]


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most that ``work`` holds in tensors at one time, above what was there before.

    On the CPU from the allocations that torch's profiler records, which is exact and the same in every run; scratch
    space inside a matmul library is not seen.

    >>> x = torch.ones(1024)
    >>> peak_bytes(lambda: (x * x) * x, torch.device("cpu"))
    8192
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would tell stderr when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def held_bytes(*tensors: torch.Tensor) -> int:
    """Bytes behind ``tensors``, each storage once.

    >>> x = torch.zeros(4)
    >>> held_bytes(x, x[:2])
    16
    """
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

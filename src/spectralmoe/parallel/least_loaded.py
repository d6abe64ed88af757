"""Least-loaded expert parallelism: tokens that a busy device cannot take go to idle ones, with their experts' weights.

Xuan-Phi Nguyen, Shrey Pandit, Austin Xu, Caiming Xiong, Shafiq Joty, "Least-Loaded Expert Parallelism: Load Balancing
An Imbalanced Mixture-of-Experts" (LLEP), arXiv 2601.17111. Written from the paper; authors' code:
github.com/SalesforceAIResearch/LeastLoadedEP.
Differs: the capacity is rounded up to whole tokens, so that with alpha = 1 all tokens fit. The test for a load that is
even enough looks at devices, not at experts. The paper's text would leave a rest below the chunk on its own device; the
paper's algorithm moves it, and so do we.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction

from spectralmoe.errors import UserError
from spectralmoe.parallel.plan import Interval, Plan, checked_load, native_load, owners, plan_native

__all__ = ["plan_least_loaded", "plan_spill", "tokens_a_device"]

Helper = Callable[[list[int], int, int, int], tuple[int, int]]


def plan_least_loaded(
    load: Iterable[int], devices: int, *, capacity: float = 1.0, chunk: int = 1024, threshold: float = 1.3
) -> Plan:
    r"""Plan that every device computes at most its capacity C; what exceeds it goes to the least loaded devices.

    .. math:: C = \lceil \alpha \textstyle\sum_e l_e / P \rceil

    The experts are taken in order of falling load l. On its own device an expert keeps the tokens for which there is
    room beside the device's other experts. Of its other tokens the least loaded device takes as many as it has room
    for, and so on until none is left. If that room is smaller than both the chunk and the number of tokens left, the
    device takes them all and exceeds its capacity (``Plan.forced``).

    The router's choice and the layer's result do not change, only where they are computed. The plan is made with whole
    numbers, and ties go to the lower number, so all ranks make the same plan of the same load.

    Args:
        load: the tokens of each expert (E,), of all ranks together.
        devices: P, which divides E.
        capacity: alpha >= 1.
        chunk: m, the smallest number of tokens for which weights are copied, unless fewer are left.
        threshold: lambda; if the busiest device has less than lambda times the mean load without any copy, the plan is
            ``plan_native``. With 0 it never is.

    Raises:
        UserError: capacity < 1, chunk < 1 or threshold < 0; or as ``plan_native``.

    >>> plan = plan_least_loaded([900, 60, 20, 20], 2, chunk=100)
    >>> plan_native([900, 60, 20, 20], 2).device_load(), plan.device_load(), plan.copies
    ([960, 40], [500, 500], [Copy(expert=0, source=0, target=1)])
    >>> plan.intervals[0]
    (Interval(device=0, start=0, end=440), Interval(device=1, start=440, end=900))
    """

    def least_loaded(held: list[int], home: int, rest: int, limit: int) -> tuple[int, int]:
        least = min(held)
        room = limit - least
        if room >= min(chunk, rest):
            return held.index(least), min(rest, room)
        return (home if held[home] == least else held.index(least)), rest

    return plan_spill(load, devices, least_loaded, capacity=capacity, chunk=chunk, threshold=threshold)


def tokens_a_device(total: int, devices: int, capacity: float) -> int:
    """Return C, the capacity of a device in tokens.

    ``capacity`` is read as a decimal number, so 1.1 is 11/10 exactly.

    Raises:
        UserError: the capacity is below 1, so that not all tokens fit, or infinite.

    >>> tokens_a_device(1000, 8, 1.0), tokens_a_device(1000, 8, 1.1), tokens_a_device(1001, 8, 1.0)
    (125, 138, 126)
    """
    if not 1 <= capacity < math.inf:
        raise UserError(f"capacity must be a number from 1 on, got {capacity}")
    return math.ceil(Fraction(str(capacity)) * total / devices)


def plan_spill(
    load: Iterable[int], devices: int, helper: Helper, *, capacity: float, chunk: int, threshold: float
) -> Plan:
    """Plan that devices compute their own experts up to their capacity; ``helper`` says who takes the tokens left.

    Args:
        helper: a function (tokens of each device so far, the expert's own device, tokens left, C) -> (device, how many
            of them it takes).

    Raises:
        UserError: as ``plan_least_loaded``.
    """
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise UserError(f"chunk must be a whole number of tokens from 1 on, got {chunk!r}")
    if not 0 <= threshold < math.inf:
        raise UserError(f"threshold must be 0 or more, got {threshold}")
    counts = checked_load(load)
    homes, limit = owners(len(counts), devices), tokens_a_device(sum(counts), devices, capacity)
    held = native_load(counts, homes, devices)
    if max(held) * devices < Fraction(str(threshold)) * sum(counts):
        return plan_native(counts, devices)
    intervals: list[tuple[Interval, ...]] = [()] * len(counts)
    for e in sorted(range(len(counts)), key=counts.__getitem__, reverse=True):
        home, number = homes[e], counts[e]
        held[home] -= number
        free = limit - held[home]
        start = number if number <= free else max(0, free)
        held[home] += start
        parts = [Interval(home, 0, start)] if start else []
        while start < number:
            device, size = helper(held, home, number - start, limit)
            held[device] += size
            begin = parts.pop().start if parts and parts[-1].device == device else start
            start += size
            parts.append(Interval(device, begin, start))
        intervals[e] = tuple(parts)
    forced = sum(tokens - limit for tokens in held if tokens > limit)
    return Plan(devices, tuple((home,) for home in homes), tuple(intervals), forced)

"""Replicas: several devices hold a copy of a busy expert, and its tokens are divided evenly among them.

In the manner of DeepSeek's expert parallelism load balancer (github.com/deepseek-ai/EPLB, MIT), in its form for one
group: replicas go to the largest load per replica, and the heaviest are packed first, onto the least loaded device.
Differs: no device holds an expert twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush

from spectralmoe.errors import UserError
from spectralmoe.parallel.plan import Interval, Plan, checked_load, owners

__all__ = ["plan_replicas"]


def plan_replicas(load: Iterable[int], devices: int, *, spare: int = 1, seen: Iterable[int] | None = None) -> Plan:
    """Plan with replicas that are chosen by an earlier load, so that no weights are sent in a step.

    Each device holds E/P + ``spare`` experts.

    Args:
        load: the tokens of each expert (E,).
        devices: P, which divides E.
        spare: how many more experts than E/P a device holds.
        seen: the earlier load by which replicas are chosen. The default is ``load`` itself, which no system knows in
            advance, so the plan is then better than a real one.

    Raises:
        UserError: ``spare`` is negative, ``seen`` has another number of experts; or as ``plan_native``.

    >>> plan = plan_replicas([900, 60, 20, 20], 2)
    >>> plan.homes, plan.device_load(), plan.copies
    (((0, 1), (0, 1), (0,), (1,)), [500, 500], [])
    """
    counts = checked_load(load)
    known = counts if seen is None else checked_load(seen)
    owners(len(counts), devices)
    if isinstance(spare, bool) or not isinstance(spare, int) or spare < 0:
        raise UserError(f"spare must be a whole number of places from 0 on, got {spare!r}")
    if len(known) != len(counts):
        raise UserError(f"seen has {len(known)} experts, load has {len(counts)}")
    numbers = _numbers(known, devices, len(known) + devices * spare)
    homes = _packed(known, numbers, devices, len(known) // devices + spare)
    return Plan(devices, homes, tuple(map(_dealt, counts, homes)))


def _numbers(load: Sequence[int], devices: int, places: int) -> list[int]:
    """How many places each expert has: one, and one more at a time where the load per place is largest; at most P."""
    numbers = [1] * len(load)
    busiest = [(-float(number), e) for e, number in enumerate(load)] if devices > 1 else []
    heapify(busiest)
    for _ in range(places - len(load)):
        if busiest:
            _, e = heappop(busiest)
            numbers[e] += 1
            if numbers[e] < devices:
                heappush(busiest, (-load[e] / numbers[e], e))
    return numbers


def _packed(load: Sequence[int], numbers: Sequence[int], devices: int, room: int) -> tuple[tuple[int, ...], ...]:
    """The devices of each expert. A replica that finds no device without its expert is left out."""
    homes: list[tuple[int, ...]] = [()] * len(load)
    free, left = [(0.0, device) for device in range(devices)], [room] * devices
    for e in sorted(range(len(load)), key=lambda e: (-load[e] / numbers[e], e)):
        taken = [heappop(free) for _ in range(min(numbers[e], len(free)))]
        homes[e] = tuple(device for _, device in taken)
        for held, device in taken:
            left[device] -= 1
            if left[device]:
                heappush(free, (held + load[e] / len(taken), device))
    return tuple(homes)


def _dealt(tokens: int, homes: Sequence[int]) -> tuple[Interval, ...]:
    """Equal parts of an expert's tokens, which differ by one at most."""
    cuts = [tokens * i // len(homes) for i in range(len(homes) + 1)]
    return tuple(
        Interval(device, start, end)
        for device, start, end in zip(homes, cuts[:-1], cuts[1:], strict=True)
        if start < end
    )

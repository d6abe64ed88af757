"""A plan says which device computes which tokens of each expert; it is made of whole numbers, alike on all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from spectralmoe.errors import UserError
from spectralmoe.parallel.cost import Cost

__all__ = ["Copy", "Interval", "Plan", "checked_load", "native_load", "owners", "plan_native"]


class Interval(NamedTuple):
    """The tokens ``start`` up to ``end`` of an expert, which ``device`` computes; they are counted rank by rank."""

    device: int
    start: int
    end: int


class Copy(NamedTuple):
    """An expert whose weights are sent from the device that holds them to one that computes some of its tokens."""

    expert: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Says which device computes which tokens of each expert.

    Attributes:
        devices: P.
        homes: for each expert the devices that hold its weights anyway; the first owns it.
        intervals: for each expert the intervals of its tokens, in order and without gaps.
        forced: how many tokens exceed the capacity of their device, because no device had room for a chunk.
    """

    devices: int
    homes: tuple[tuple[int, ...], ...]
    intervals: tuple[tuple[Interval, ...], ...]
    forced: int = 0

    @property
    def load(self) -> list[int]:
        """The number of tokens of each expert."""
        return [parts[-1].end if parts else 0 for parts in self.intervals]

    @property
    def copies(self) -> list[Copy]:
        """The copies of weights that are sent, each once, in the order of the experts and their intervals."""
        return [
            Copy(e, homes[0], device)
            for e, (homes, parts) in enumerate(zip(self.homes, self.intervals, strict=True))
            for device in dict.fromkeys(part.device for part in parts)
            if device not in homes
        ]

    def work(self) -> list[dict[int, int]]:
        """Return for each device the tokens of every expert that it computes or holds: expert -> tokens."""
        work: list[dict[int, int]] = [{} for _ in range(self.devices)]
        for e, (homes, parts) in enumerate(zip(self.homes, self.intervals, strict=True)):
            for device in homes:
                work[device][e] = 0
            for device, start, end in parts:
                work[device][e] = work[device].get(e, 0) + end - start
        return work

    def device_load(self) -> list[int]:
        """Return the number of tokens that each device computes."""
        return [sum(experts.values()) for experts in self.work()]

    def imbalance(self) -> float:
        """Return the busiest device's tokens over the mean: 1 is even, P is one device for all; 1 without tokens."""
        loads = self.device_load()
        return max(loads) * self.devices / sum(loads) if any(loads) else 1.0

    def modelled_time(self, cost: Cost) -> float:
        """Return the seconds until all devices are done; each sends or receives weights, then runs its experts."""
        moved = self.copies
        sent, received = [0] * self.devices, [0] * self.devices
        for copy in moved:
            sent[copy.source] += 1
            received[copy.target] += 1
        return max(
            max(out, into) * cost.copy_seconds() + sum(cost.seconds(tokens) for tokens in experts.values())
            for out, into, experts in zip(sent, received, self.work(), strict=True)
        )

    def modelled_bytes(self, cost: Cost) -> int:
        """Return the bytes on the fullest device: the weights of the experts there, and their tokens' activations."""
        return max(sum(map(cost.bytes, experts.values())) for experts in self.work())


def plan_native(load: Iterable[int], devices: int) -> Plan:
    """Plan plain expert parallelism: device p computes all tokens of its own experts, p E/P up to (p + 1) E/P.

    Args:
        load: the tokens of each expert (E,).
        devices: P, which divides E.

    Raises:
        UserError: the load is empty or has numbers that are negative or not whole; P is no positive whole number or
            does not divide E.

    >>> plan_native([6, 0, 1, 1], 2).device_load()
    [6, 2]
    """
    counts = checked_load(load)
    homes = owners(len(counts), devices)
    intervals = tuple((Interval(home, 0, n),) if n else () for n, home in zip(counts, homes, strict=True))
    return Plan(devices, tuple((home,) for home in homes), intervals)


def owners(experts: int, devices: int) -> list[int]:
    """Return the device that owns each expert; each device owns E/P consecutive ones.

    Raises:
        UserError: P is no positive whole number, or does not divide E.

    >>> owners(6, 3)
    [0, 0, 1, 1, 2, 2]
    """
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise UserError(f"devices must be a whole number from 1 on, got {devices!r}")
    each, left = divmod(experts, devices)
    if left or not each:
        fitting = ", ".join(str(p) for p in range(1, experts + 1) if experts % p == 0)
        raise UserError(f"{devices} devices cannot share {experts} experts evenly; take one of {fitting}")
    return [e // each for e in range(experts)]


def native_load(counts: Sequence[int], homes: Sequence[int], devices: int) -> list[int]:
    """Return the tokens of each device if every expert is computed on the device that owns it."""
    held = [0] * devices
    for home, number in zip(homes, counts, strict=True):
        held[home] += number
    return held


def checked_load(load: Iterable[int]) -> list[int]:
    """Return the tokens of each expert as a list of whole numbers, given a list or a tensor (E,).

    Raises:
        UserError: the load is empty, or a number is negative or not whole.
    """
    counts: Sequence[int] = load.tolist() if hasattr(load, "tolist") else list(load)
    if not isinstance(counts, list) or not counts:
        raise UserError("load needs the tokens of each expert, one number an expert")
    if set(map(type, counts)) != {int} or min(counts) < 0:
        e, wrong = next((e, number) for e, number in enumerate(counts) if type(number) is not int or number < 0)
        raise UserError(f"load of expert {e} must be a whole number from 0 on, got {wrong!r}")
    return counts

"""Times of several candidates, measured in turns.

All sides run in one process. In each round each side runs once, in an order drawn anew, so that what the machine does
meanwhile (clock, temperature, neighbours) falls on all of them alike; what is reported is the median over the rounds
of the *ratio* of two sides, with an interval for that median. Garbage is collected between the rounds, never inside a
measurement.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["Interval", "Times", "median", "pick_stopwatch", "quiet", "ratio", "take_times"]

WARM_UP = 2
SAMPLE_SECONDS = 2e-3  # shorter work is repeated within one sample
SLOW = 4.0  # times the middle one: a slower peer takes part in fewer rounds, so that its share of the time is bounded

Work = Callable[[], object]
Stopwatch = Callable[[Work], float]
Times = dict[int, float]
"""Round -> seconds."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A median, and between which values it lies with 95% confidence (None: too few rounds to say).

    Attributes:
        rounds: how many values there were.
    """

    middle: float
    low: float | None
    high: float | None
    rounds: int

    def as_json(self) -> dict[str, float | int | None]:
        """As JSON values."""
        return {"median": self.middle, "low": self.low, "high": self.high, "rounds": self.rounds}


def median(values: Sequence[float]) -> Interval:
    """The median with its interval from order statistics, which assumes nothing about the distribution.

    The r-th smallest and the r-th largest of n values enclose the median with probability 1 - 2 P(B < r), B binomial
    of n halves; r is the largest with at least 95%.

    >>> median([3.0, 1.0, 2.0])
    Interval(middle=2.0, low=None, high=None, rounds=3)
    >>> median([5.0, 1.0, 4.0, 2.0, 6.0, 3.0])
    Interval(middle=3.5, low=1.0, high=6.0, rounds=6)
    """
    ordered, n = sorted(values), len(values)
    outside, cut = 0, 0
    while cut < n:
        outside += math.comb(n, cut)
        if 2 * outside > 0.05 * 2**n:
            break
        cut += 1
    if cut == 0:
        return Interval(statistics.median(ordered), None, None, n)
    return Interval(statistics.median(ordered), ordered[cut - 1], ordered[n - cut], n)


def ratio(ours: Times, theirs: Times) -> Interval:
    """The median of ours / theirs over the rounds that both took part in."""
    return median([seconds / theirs[number] for number, seconds in ours.items() if number in theirs])


def take_times(
    sides: Mapping[str, Work],
    rounds: int,
    *,
    fewer: Collection[str] = (),
    stopwatch: Stopwatch | None = None,
    order: random.Random | None = None,
    tick: Callable[[float], None] = lambda share: None,
) -> dict[str, Times]:
    """Seconds of one run of each side in each round.

    Args:
        fewer: sides that take part in fewer rounds where they are slow (``SLOW``); the others in every round.
        stopwatch: work -> seconds.
        order: draws the order within each round.
        tick: told the share that is done.
    """
    stopwatch, order = stopwatch or wall_clock, order or random.Random(0)
    with quiet():
        warm = {name: min(stopwatch(work) for _ in range(WARM_UP)) for name, work in sides.items()}
        usual = SLOW * statistics.median(warm.values()) if warm else 0.0
        repeats = {name: max(1, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-7))) for name, seconds in warm.items()}
        every = {name: max(math.ceil(warm[name] / usual), 1) if name in fewer and usual else 1 for name in sides}
        samples: dict[str, Times] = {name: {} for name in sides}
        for number in range(rounds):
            taking_part = [name for name in sides if number % every[name] == 0]
            order.shuffle(taking_part)
            for name in taking_part:
                samples[name][number] = stopwatch(_repeated(sides[name], repeats[name])) / repeats[name]
            gc.collect()
            tick((number + 1) / rounds)
    return samples


def pick_stopwatch(device: torch.device) -> Stopwatch:
    """The wall clock, or the device's own events."""
    return device_events if device.type == "cuda" else wall_clock


def wall_clock(work: Work) -> float:
    """Seconds of ``work`` on the CPU."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def device_events(work: Work) -> float:
    """Seconds of ``work`` between two events of the CUDA stream, which is idle before and after."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    end.synchronize()
    seconds: float = begin.elapsed_time(end) / 1000
    return seconds


@contextmanager
def quiet() -> Iterator[None]:
    """Collect garbage only between measurements, and only objects made since the last one."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def _repeated(work: Work, times: int) -> Work:
    def several() -> None:
        for _ in range(times):
            work()

    return work if times == 1 else several

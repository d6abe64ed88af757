"""Tests whether the machine is idle otherwise: a ratio from a busy machine is not reported."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from spectralmoe.errors import UserError

__all__ = ["LIMIT", "WINDOW", "Idle", "processor_seconds"]

LIMIT = 0.5
"""Busy threads of others beyond which a machine is busy."""
WINDOW = 1.0
"""Seconds that a look rests on at least."""

_STAT = Path("/proc/stat")


def processor_seconds() -> float:
    """Seconds that all processors together have worked since the machine started; NaN if the system does not say.

    Work for a machine beside this one on the same processors (steal) counts; waiting for a disk does not.
    """
    if _STAT.exists():
        user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(
            int, _STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
        )
        ticks = user + nice + system + irq + softirq + steal
        return float(ticks / os.sysconf("SC_CLK_TCK"))
    try:
        import psutil
    except ImportError:
        return math.nan
    times = psutil.cpu_times()._asdict()
    return float(sum(seconds for name, seconds in times.items() if name not in ("idle", "iowait", "guest")))


def own_seconds() -> float:
    """The part of ``processor_seconds`` used by this process and by its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Idle:
    """Measures how much of the machine other processes use between two calls.

    Args:
        busy: seconds of work of all processors.
        own: seconds of them that were ours.
        clock: seconds.
        pause: waits for so many seconds, before the first answer.
    """

    def __init__(
        self,
        busy: Callable[[], float] = processor_seconds,
        own: Callable[[], float] = own_seconds,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        self._busy, self._own, self._clock, self._pause = busy, own, clock, pause
        self._since: tuple[float, float] | None = None
        self._answer = math.nan

    def others(self) -> float:
        """How many threads of others have worked, on average since the last look; NaN where the machine does not say.

        The first look takes ``WINDOW`` seconds; one that comes sooner after another gives that one's answer.
        """
        if self._since is None:
            self._since = self._look()
            self._pause(WINDOW)
        (work, at), (work_then, then) = self._look(), self._since
        if at - then >= WINDOW:
            self._answer = max((work - work_then) / (at - then), 0.0)
            self._since = work, at
        return self._answer

    def demand(self, when: str) -> float:
        """``others()``.

        Raises:
            UserError: the machine is busy, or nobody can say.
        """
        load = self.others()
        if math.isnan(load):
            raise UserError("nothing here says whether the machine is idle: install psutil, or add --allow-busy")
        if load > LIMIT:
            raise UserError(
                f"the machine is not idle {when}: others keep {load:.1f} threads busy (at most {LIMIT}); stop them and "
                "start the same command again, or see what it is worth with --allow-busy"
            )
        return load

    def _look(self) -> tuple[float, float]:
        """Seconds that others have worked, and the time."""
        return self._busy() - self._own(), self._clock()

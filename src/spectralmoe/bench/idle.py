"""Whether the machine does anything else: a ratio from a busy machine is not reported."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

from spectralmoe.errors import UserError

__all__ = ["LIMIT", "Idle"]

LIMIT = 0.5
"""The load of others, in runnable threads, beyond which a machine is busy."""

_MINUTE = 60.0


class Idle:
    """The machine's load average less our own share of it.

    The kernel's average of the last minute is an exponential one; our share is the same average of the rate at which
    this process has used the processor, brought up to date at each look.

    Args:
        load: the load average of the last minute.
        used: seconds of processor time that this process has used.
        clock: seconds.
    """

    def __init__(
        self,
        load: Callable[[], float] = lambda: os.getloadavg()[0],
        used: Callable[[], float] = time.process_time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load, self._used, self._clock = load, used, clock
        self._seen, self._at = used(), clock()
        self._own = self._seen / _MINUTE  # a process that has just started, importing

    def others(self) -> float:
        """How many threads of others have been running or waiting, on average over the last minute; at least 0."""
        used, now = self._used(), self._clock()
        if now > self._at:
            kept = math.exp(-(now - self._at) / _MINUTE)
            self._own = self._own * kept + (used - self._seen) / (now - self._at) * (1 - kept)
            self._seen, self._at = used, now
        return max(self._load() - self._own, 0.0)

    def demand(self, when: str) -> float:
        """``others()``.

        Raises:
            UserError: the machine is busy.
        """
        load = self.others()
        if load > LIMIT:
            raise UserError(
                f"the machine is not idle {when}: others keep {load:.1f} threads busy (at most {LIMIT}); wait a minute "
                "and start again, or see what it is worth with --allow-busy"
            )
        return load

"""A process that is killed at a chosen moment: in a cell, or on either side of a file that takes its name."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path


class Moments:
    """Counts moments, and kills its own process at the last one; None: it lives on."""

    def __init__(self, last: int | None) -> None:
        self.last, self.count = last, 0

    def pass_one(self) -> None:
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(last: int | None, work: Callable[[Callable[..., None]], object]) -> bool:
    """Whether a child died at its moment ``last`` of ``work``, which gets a progress callback; else it ended well."""
    pid = os.fork()
    if pid == 0:
        moments, replace = Moments(last), Path.replace

        def observed(path: Path, target: Path) -> Path:
            moments.pass_one()
            replace(path, target)
            moments.pass_one()
            return target

        Path.replace = observed  # type: ignore[method-assign]
        work(lambda *_, **__: moments.pass_one())
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), f"the child ended with status {status}"
    return status == signal.SIGKILL

"""Many independent jobs, run here one after the other or in several processes, with progress."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context, parent_process
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.machine import threads
from spectralmoe.training.loop import Progress

__all__ = ["Job", "WorkerLost", "run_jobs"]

_GLANCE = 0.3  # seconds between two looks at the progress of the processes
_STOP = -1.0


class WorkerLost(UserError):
    """A process of the run ended without a message, which need not be a mistake of the user."""

    exit_code = 1


class Job(NamedTuple):
    """``function(*arguments, progress)``, where ``progress(share)`` is called now and then, 0 to 1.

    Attributes:
        key: what the result is known by.
        text: what is shown while it runs.
    """

    key: Any
    text: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def run_jobs(jobs: Sequence[Job], processes: int, progress: Progress) -> Iterator[tuple[Any, Any]]:
    """The key and result of each job, as they finish.

    A small network makes little use of a second core, but two networks do: with ``processes`` > 1 as many jobs run at a
    time, each in a process of its own on one thread. The processes end with the one that started them, however that
    ends. They import the main module anew, so a script that calls this needs ``if __name__ == "__main__"``. A job that
    is alone runs here, on one thread too, so that its bits do not depend on how many jobs there were.

    Raises:
        WorkerLost: a process was killed from outside.
        Whatever a job raises; the others are stopped.
    """
    if min(processes, len(jobs)) > 1:
        yield from _in_processes(jobs, min(processes, len(jobs)), progress)
        return
    for place, job in enumerate(jobs):
        tell = partial(_tell, progress, _title(job, place, jobs), place, len(jobs))
        with threads(1 if processes > 1 else torch.get_num_threads()):
            result = job.function(*job.arguments, tell)
        yield job.key, result


def _in_processes(jobs: Sequence[Job], processes: int, progress: Progress) -> Iterator[tuple[Any, Any]]:
    shares = torch.zeros(len(jobs)).share_memory_()
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_begin)
    try:
        running = {pool.submit(_work, job, shares[place]): place for place, job in enumerate(jobs)}
        while running:
            done, _ = wait(running, timeout=_GLANCE, return_when=FIRST_COMPLETED)
            latest = max((place for place in running.values() if shares[place] > 0), default=0)
            progress(_title(jobs[latest], latest, jobs), float(0.9 * shares.mean()))
            for future in sorted(done, key=running.__getitem__):
                yield jobs[running.pop(future)].key, future.result()
    except BrokenProcessPool as error:
        raise WorkerLost(
            "a process was killed, perhaps for want of memory; what was finished is kept: start the same command again "
            "to go on, with fewer processes at a time if that was the reason"
        ) from error
    finally:
        shares.fill_(_STOP)
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Set up a worker process: one thread, interrupts ignored, ended when its parent ends."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Stopped(Exception):
    """The parent asked this process to stop."""


def _work(job: Job, share: Tensor) -> Any:
    def progress(done: float) -> None:
        if float(share) == _STOP:
            raise _Stopped
        share.fill_(max(done, 1e-6))

    progress(0)
    result = job.function(*job.arguments, progress)
    share.fill_(1)
    return result


def _tell(progress: Progress, text: str, place: int, jobs: int, share: float) -> None:
    progress(text, (place + 0.9 * share) / jobs)


def _title(job: Job, place: int, jobs: Sequence[Job]) -> str:
    return f"{job.text} ({place + 1}/{len(jobs)})"

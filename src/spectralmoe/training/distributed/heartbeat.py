"""If a process dies, the others end: each writes heartbeats to the shared store, and watches the next process.

torchrun ends the processes of its own machine, and says so in a report of its own. Those of other machines may wait in
a collective for as long as its timeout; here each has a thread that ends it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

from torch.distributed.distributed_c10d import Store

from spectralmoe.errors import UserError, first_line

__all__ = ["watched"]

_BEAT = 1.0  # seconds
_SILENCE = 20  # beats of its own in which a process did not hear the next one: that one is dead
_LIKELY = 5  # the same where something has failed already
_UNBORN = 300  # the same before its first beat
_TIMEOUT = 20.0  # seconds, of the store
_CAUSE, _LEFT = "cause", "left"


class _Ended(UserError):
    """This process was ended by a signal."""

    exit_code = 128 + signal.SIGTERM


class _Heartbeat(threading.Thread):
    """The thread of one process: beats, watches the next process, and ends this one when the run has failed.

    The first that knows why the run failed writes it to the store and tells the user; the others are silent.
    """

    def __init__(self, store: Store, rank: int, world: int) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.store, self.rank, self.world = store, rank, world
        self.stopped, self.silence = threading.Event(), _SILENCE
        store.set_timeout(timedelta(seconds=_TIMEOUT))
        store.set(f"who/{rank}", f"process {os.getpid()} on {socket.gethostname()}")
        store.set(f"beat/{rank}", "0")

    def run(self) -> None:
        try:
            self._watch()
        except RuntimeError as error:  # of the store
            if not self.stopped.is_set():
                told = os.environ.get("LOCAL_RANK", "0") != "0"  # one line a machine: there is nothing to agree by
                self._end(f"the store that the processes met in is gone ({first_line(error)})", told=told)

    def claim(self, cause: str) -> bool:
        """Whether ``cause`` is the first failure that was reported."""
        return bool(self.store.compare_set(_CAUSE, "", cause).decode() == cause)

    def who(self, rank: int) -> str:
        """A process by its rank, its id and its machine."""
        return f"rank {rank} of {self.world} ({self.store.get(f'who/{rank}').decode()})"

    def blame(self, error: BaseException) -> None:
        """Report that this process fails. Returns if it is the first to fail; else ends the process."""
        self.silence = _LIKELY
        if isinstance(error, _Ended) or not isinstance(error, UserError | KeyboardInterrupt):
            time.sleep((_LIKELY + 3) * _BEAT)  # a lost connection: the one that was lost is found in this time
        try:
            me = self.who(self.rank)
            first = self.claim(f"{me} failed")
        except RuntimeError:  # the store is gone; the thread says so
            first = False
        if not first:
            for kind in (signal.SIGTERM, signal.SIGINT):
                signal.signal(kind, signal.SIG_DFL)
            self._follow()
        self.stopped.set()
        if isinstance(error, Exception) and not isinstance(error, UserError):
            print(f"error: {me} failed and ends the others: {first_line(error)}", file=sys.stderr, flush=True)

    def leave(self) -> None:
        """Report that this process is done."""
        self.stopped.set()
        self.join()
        self.store.set(f"beat/{self.rank}", _LEFT)

    def _watch(self) -> None:
        ahead = (self.rank + 1) % self.world
        count, heard, silent = 0, "", 0
        while not self.stopped.wait(_BEAT):
            count += 1
            self.store.set(f"beat/{self.rank}", str(count))
            if self.store.check([_CAUSE]):
                return self._end(self.store.get(_CAUSE).decode(), told=True)
            beat = self.store.get(f"beat/{ahead}").decode() if self.store.check([f"beat/{ahead}"]) else ""
            silent = silent + 1 if beat == heard != _LEFT else 0
            heard = beat
            if silent > (self.silence if heard else _UNBORN):
                cause = f"{self.who(ahead)} died" if heard else f"rank {ahead} of {self.world} did not come"
                return self._end(cause, told=not self.claim(cause))

    def _end(self, cause: str, *, told: bool) -> None:
        if told:
            self._follow()
        print(
            f"error: {cause}; start the same command again to go on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def _follow(self) -> NoReturn:
        """Let the process that tells the user end first: torchrun names it, and ends the others."""
        time.sleep(2 * _LIKELY * _BEAT)
        os._exit(1)


@contextmanager
def watched(store: Store, rank: int, world: int) -> Iterator[None]:
    """While the block runs, a process that dies ends all: within a minute, with one line that says which.

    A process that fails by itself says why, and ends the others, which are silent.

    Args:
        store: a connection of its own to the store of all processes.
    """
    heartbeat, failing = _Heartbeat(store, rank, world), False

    def end(*_: Any) -> None:
        if not failing:
            raise _Ended("ended by a signal (SIGTERM); what was finished is kept")

    before = signal.signal(signal.SIGTERM, end)
    heartbeat.start()
    try:
        yield
    except BaseException as error:
        failing = True
        heartbeat.blame(error)
        raise
    else:
        heartbeat.leave()
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

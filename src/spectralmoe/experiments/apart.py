"""One job of a file of jobs, in a process of its own on whatever machine this is.

``python -m spectralmoe.experiments.apart JOBS NUMBER`` is that process. It reads the code and the file afresh, computes
on one thread, shares no random numbers with others, and ends when the one that started it has ended or the file is
gone.
"""

from __future__ import annotations

import os
import pickle
import platform
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spectralmoe.errors import UserError
from spectralmoe.experiments.workers import Job
from spectralmoe.files import read_json
from spectralmoe.machine import versions

__all__ = ["Outcome", "run_apart", "write_jobs"]

_REFUSED = 3


class Outcome(NamedTuple):
    """What became of a job: its result, or the one line of a user's error, or what a fault of the program printed."""

    result: Any = None
    refusal: str | None = None
    fault: str | None = None


def write_jobs(file: Path, jobs: Sequence[Job]) -> None:
    """Write what ``run_apart`` needs: the versions, where modules are found besides the installed ones, the jobs."""
    own = (Path(sys.prefix), Path(sys.base_prefix))
    places = [str(Path(entry).resolve()) for entry in sys.path]
    with file.open("wb") as out:
        pickle.dump((versions(), [p for p in places if not any(Path(p).is_relative_to(o) for o in own)]), out)
        pickle.dump(list(jobs), out)
        out.flush()
        os.fsync(out.fileno())


def run_apart(file: str, number: int, result: str) -> Outcome:
    """Run a job of ``file`` in a process of its own.

    Args:
        result: the JSON file that the job writes. Where it is there, nothing is run: engines run a job again when a
            machine is lost that held what came back.

    Raises:
        RuntimeError: the process was killed, so another try may do.
    """
    if Path(result).exists():
        return Outcome(read_json(Path(result)))
    if not Path(file).exists():
        folder = Path(result).parent
        return Outcome(refusal=f"{platform.node()} does not see {folder}; all machines must share it under this path")
    begun, ended = os.pipe()  # the process ends when no one holds the second end any more
    try:
        command = [sys.executable, "-m", __name__, file, str(number)]
        done = subprocess.run(command, stdin=begun, capture_output=True, text=True, errors="replace", check=False)
    finally:
        os.close(begun)
        os.close(ended)
    if done.returncode < 0:
        raise RuntimeError(f"a process on {platform.node()} was killed by signal {-done.returncode}")
    if done.returncode == _REFUSED:
        return Outcome(refusal=done.stderr.strip().splitlines()[-1])
    if done.returncode:
        return Outcome(fault=f"on {platform.node()}:\n{done.stderr}")
    return Outcome(read_json(Path(result)))


def _main(file: Path, number: int) -> int:
    threading.Thread(target=_end_with_starter, daemon=True).start()
    torch.set_num_threads(1)
    try:
        job = _read(file, number)
        job.function(*job.arguments, lambda share: _go_on(file))
    except UserError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return _REFUSED
    return 0


def _read(file: Path, number: int) -> Job:
    """The job, with modules found where the process that wrote the file found them.

    Raises:
        UserError: other versions here than there.
    """
    with file.open("rb") as jobs:
        there, places = pickle.load(jobs)
        for name, version in versions().items():
            if version != there[name]:
                raise UserError(
                    f"{platform.node()} has {name} {version}, and the run {there[name]}: results of several versions "
                    "are not mixed; install the same there"
                )
        sys.path[:0] = [place for place in places if place not in sys.path]
        job: Job = pickle.load(jobs)[number]
        return job


def _end_with_starter() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def _go_on(file: Path) -> None:
    if not file.exists():
        sys.exit(f"{file} is gone: nobody waits for this any more")


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), int(sys.argv[2])))

"""The process of one job: ``python -m spectralmoe.experiments.one_job JOBS NUMBER``.

It reads the code and the file of jobs afresh, computes on one thread and shares no random numbers with other jobs. It
ends when the process that started it has ended or the file is gone.
"""

from __future__ import annotations

import os
import pickle
import platform
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from spectralmoe.errors import UserError
from spectralmoe.experiments.apart import REFUSED
from spectralmoe.experiments.workers import Job
from spectralmoe.machine import versions

__all__ = ["write_jobs"]


def write_jobs(file: Path, jobs: Sequence[Job]) -> None:
    """Write what ``run_apart`` needs: the versions, where modules are found besides the installed ones, the jobs."""
    own = (Path(sys.prefix), Path(sys.base_prefix))
    places = [str(Path(entry).resolve()) for entry in sys.path]
    with file.open("wb") as out:
        pickle.dump((versions(), [p for p in places if not any(Path(p).is_relative_to(o) for o in own)]), out)
        pickle.dump(list(jobs), out)
        out.flush()
        os.fsync(out.fileno())


def _main(file: Path, number: int) -> int:
    threading.Thread(target=_end_with_starter, daemon=True).start()
    torch.set_num_threads(1)
    try:
        job = _read(file, number)
        job.function(*job.arguments, lambda share: _go_on(file))
    except UserError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return REFUSED
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

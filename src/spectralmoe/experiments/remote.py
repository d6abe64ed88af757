"""Jobs on other machines, by an engine: a Dask cluster, or SLURM by submitit.

Both take a function and give back futures, as ``concurrent.futures`` does. What goes to them is the place of a job in a
file; the file, and what the job writes, are in a folder that all machines share.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from spectralmoe.errors import UserError, first_line
from spectralmoe.experiments.apart import Outcome, run_apart
from spectralmoe.experiments.one_job import write_jobs
from spectralmoe.experiments.workers import Job, WorkerLost
from spectralmoe.files import part_folder
from spectralmoe.training.loop import Progress

__all__ = ["Dask", "Remote", "Submitit", "run_elsewhere"]

_GLANCE = 0.2  # seconds between two looks at what has finished
_PATIENCE = 10  # seconds for a scheduler to answer
_TRIES = 3  # more, of a job whose process was killed
_GO_ON = "what was finished is kept: start the same command again to go on"

Task = tuple[str, int, str]
"""Arguments of ``run_apart``."""


class Future(Protocol):
    """The interface that the futures of an engine must have."""

    def done(self) -> bool:
        """Whether there is a result."""

    def result(self) -> Outcome:
        """The result, or what the engine raises in its place."""


class Remote(Protocol):
    """An engine on other machines."""

    @property
    def name(self) -> str:
        """The name for users."""

    def running(self, tasks: Sequence[Task], folder: Path) -> AbstractContextManager[Sequence[Future]]:
        """The futures of ``run_apart(*task)``; when the block ends, those that have not finished are cancelled.

        Args:
            folder: for files of the engine's own.
        """


@dataclass(frozen=True, slots=True)
class Dask:
    """The workers of a Dask scheduler at ``address``, which may come and go.

    What its client logs is left out, so that the line of progress stands alone; scheduler and workers have logs too.
    """

    address: str

    @property
    def name(self) -> str:
        return self.address

    @contextmanager
    def running(self, tasks: Sequence[Task], folder: Path) -> Iterator[Sequence[Future]]:
        """See ``Remote``.

        Raises:
            UserError: ``distributed`` is not there, or no scheduler.
            WorkerLost: the scheduler has gone, or a job took too many workers along.
        """
        client = self._client()
        pool = client.get_executor(pure=False, retries=_TRIES)
        try:
            yield [pool.submit(run_apart, *task) for task in tasks]
        except CancelledError as error:
            raise WorkerLost(f"the scheduler at {self.address} is gone; {_GO_ON}") from error
        finally:
            with suppress(Exception):  # of a scheduler that is gone
                pool.shutdown(wait=False)
            client.close(timeout=_PATIENCE)

    def _client(self) -> Any:
        try:
            import dask

            silent = dict.fromkeys(("distributed", "distributed.client", "distributed.gc", "tornado"), "critical")
            with dask.config.set(logging=silent):  # read once, when distributed is imported
                import distributed
        except ImportError as error:
            raise UserError(
                "--cluster needs Dask: pip install 'spectralmoe[cluster]', then the same command"
            ) from error
        try:
            make: Any = distributed.Client
            return make(self.address, timeout=_PATIENCE, set_as_default=False)
        except (OSError, ValueError, RuntimeError) as error:
            why = first_line(error)
            raise UserError(
                f"no Dask scheduler answers at {self.address} ({why}); start one with 'dask scheduler', and name it as "
                "tcp://HOST:8786"
            ) from error


@dataclass(frozen=True, slots=True)
class Submitit:
    """A queue of jobs, by submitit: ``slurm``, or ``local`` for processes here.

    Attributes:
        options: of ``submitit.AutoExecutor.update_parameters``, such as ``timeout_min`` and ``slurm_partition``.
    """

    system: str = "slurm"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.system

    @contextmanager
    def running(self, tasks: Sequence[Task], folder: Path) -> Iterator[Sequence[Future]]:
        """See ``Remote``; the jobs are one array.

        Raises:
            UserError: submitit is not there, or not the queue; an option that it does not know.
        """
        try:
            import submitit
        except ImportError as error:
            raise UserError(
                "--submit needs submitit: pip install 'spectralmoe[slurm]', then the same command"
            ) from error
        try:
            executor = submitit.AutoExecutor(folder=folder, cluster=self.system)
            executor.update_parameters(**{"name": "spectralmoe", "cpus_per_task": 1, **self.options})
            jobs = executor.map_array(run_apart, *map(list, zip(*tasks, strict=True)))
        except (ValueError, NameError, AssertionError, RuntimeError) as error:
            raise UserError(f"--submit {self.system} cannot be had: {first_line(error)}") from error
        try:
            yield jobs
        finally:
            for job in jobs:
                if not job.done():
                    job.cancel(check=False)


def run_elsewhere(
    folder: Path, jobs: Sequence[Job], remote: Remote, progress: Progress
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The key and result of each job, as they finish; a job writes its result to ``folder/KEY.json``.

    Each job runs in a process of its own, on one thread (``run_apart``).

    Raises:
        WorkerLost: the engine has lost a job.
        UserError: what a job raises, or cannot be had there; the others are stopped.
        RuntimeError: a fault of the program, as it was printed there.
    """
    if not jobs:
        return
    folder = folder.resolve()
    with part_folder(folder) as part:
        write_jobs(part / "jobs", jobs)
        tasks = [(str(part / "jobs"), place, str(folder / f"{job.key}.json")) for place, job in enumerate(jobs)]
        with remote.running(tasks, part) as futures:
            waiting = dict(enumerate(futures))
            while waiting:
                done = len(jobs) - len(waiting)
                progress(f"{done} of {len(jobs)} done on {remote.name}", done / len(jobs))
                ready = [place for place, future in waiting.items() if future.done()]
                for place in ready:
                    yield jobs[place].key, _result(jobs[place], waiting.pop(place))
                if not ready:
                    time.sleep(_GLANCE)


def _result(job: Job, future: Future) -> dict[str, Any]:
    try:
        outcome = future.result()
    except CancelledError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(
            f"a machine of the cluster has no {error.name}; install there what is installed here"
        ) from error
    except Exception as error:  # the engine's own, of many kinds
        raise WorkerLost(f"{job.text}: {first_line(error)}; {_GO_ON}") from error
    if outcome.refusal is not None:
        raise UserError(outcome.refusal)
    if outcome.fault is not None:
        raise RuntimeError(f"{job.text}, {outcome.fault}")
    result: dict[str, Any] = outcome.result
    return result

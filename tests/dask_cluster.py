"""A Dask scheduler with workers on this machine, any of which may be killed; a nanny starts another in its place."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import psutil
from gloo_ranks import environment

__all__ = ["Cluster", "cluster"]

LIMIT = 120.0  # seconds; guards against a process that hangs


class Cluster:
    """Processes of one cluster: ``address`` of the scheduler, and what ends them."""

    def __init__(self, folder: Path, workers: int) -> None:
        config = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1000"}
        self.environment, file = environment() | config, folder / "scheduler.json"
        local = ["--host", "127.0.0.1", "--no-dashboard"]
        self.scheduler = self._start("dask_scheduler", *local, "--port", "0", "--scheduler-file", str(file))
        self.address = str(json.loads(self._written(file))["address"])
        folders = ["--local-directory", str(folder / "dask")]
        self.nannies = self._start(
            "dask_worker", self.address, *local, "--nworkers", str(workers), "--nthreads", "1", *folders
        )

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.{name}", *arguments]
        return subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _written(self, file: Path) -> str:
        ends = time.monotonic() + LIMIT
        while not (file.exists() and file.read_text().rstrip().endswith("}")):
            assert time.monotonic() < ends, "the scheduler has not started"
            time.sleep(0.05)
        return file.read_text()

    def kill_worker(self, draw: Random) -> bool:
        """Kill a worker that runs a cell; False: none does."""
        workers = [
            worker
            for worker in psutil.Process(self.nannies.pid).children()
            if any("spectralmoe.experiments.one_job" in " ".join(cell.cmdline()) for cell in worker.children())
        ]
        if workers:
            draw.choice(workers).kill()
        return bool(workers)

    def stop_scheduler(self) -> None:
        self.scheduler.kill()
        self.scheduler.wait()

    def stop(self) -> None:
        children = psutil.Process(self.nannies.pid).children(recursive=True)
        for process in (self.scheduler, self.nannies):
            process.kill()
            process.wait()
        for child in children:
            if child.is_running():
                child.kill()


@contextmanager
def cluster(folder: Path, workers: int) -> Iterator[Cluster]:
    """A cluster for the block."""
    running = Cluster(folder, workers)
    try:
        yield running
    finally:
        running.stop()

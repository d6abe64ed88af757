"""Tiny cells for tests/experiments/test_grid.py, in a module that other processes can import."""

from __future__ import annotations

import time
from pathlib import Path

from spectralmoe.errors import UserError
from spectralmoe.experiments.grid import CellJob, finished_cells, run_cells
from spectralmoe.training.loop import Diverged

__all__ = ["cell_jobs", "diverging", "refused", "run_missing", "square"]


def square(number: int, log: str, progress) -> dict[str, int]:
    """Notes that it has begun, works for a moment."""
    with Path(log).open("a", encoding="utf-8") as file:
        file.write(f"{number}\n")
    progress(0.5)
    time.sleep(0.002)
    return {"square": number**2}


def diverging(number: int, log: str, progress) -> dict[str, int]:
    raise Diverged(f"number {number} is not finite")


def refused(number: int, log: str, progress) -> dict[str, int]:
    raise UserError(f"number {number} is refused")


def cell_jobs(count: int, log: Path, function=square) -> list[CellJob]:
    return [CellJob(f"number-{n}", {"number": n}, f"number {n}", function, (n, str(log))) for n in range(count)]


def run_missing(folder: Path, count: int, log: Path, processes: int = 1, watch=lambda text, done: None) -> dict:
    """Run the cells that ``folder`` lacks; all of them."""
    done = finished_cells(folder, ("number", "cpu"))
    jobs = [job for job in cell_jobs(count, log) if job.name not in done]
    return done | dict(run_cells(folder, jobs, processes, watch))

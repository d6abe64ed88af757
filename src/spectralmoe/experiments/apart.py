"""One job of a file of jobs, run by a process of its own on whatever machine this is; without torch here."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from spectralmoe.json_files import read_json

__all__ = ["REFUSED", "Outcome", "run_apart"]

REFUSED = 3
"""Exit code of a process that tells a user's error in the last line of its stderr."""
PROCESS = "spectralmoe.experiments.one_job"


class Outcome(NamedTuple):
    """The outcome of a job: its result, the one line of a user's error, or the traceback of a bug."""

    result: Any = None
    refusal: str | None = None
    fault: str | None = None


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
        command = [sys.executable, "-m", PROCESS, file, str(number)]
        done = subprocess.run(command, stdin=begun, capture_output=True, text=True, errors="replace", check=False)
    finally:
        os.close(begun)
        os.close(ended)
    if done.returncode < 0:
        raise RuntimeError(f"a process on {platform.node()} was killed by signal {-done.returncode}")
    if done.returncode == REFUSED:
        return Outcome(refusal=done.stderr.strip().splitlines()[-1])
    if done.returncode:
        return Outcome(fault=f"on {platform.node()}:\n{done.stderr}")
    return Outcome(read_json(Path(result)))

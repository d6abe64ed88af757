"""Programs of the tests in processes of their own, forked from one that has imported torch: they start at once."""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

__all__ = ["ends", "environment", "output_of", "start"]

TESTS = Path(__file__).parent
SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed.fsdp"])


def environment() -> dict[str, str]:
    """Of a process that knows the source and the modules of the tests, and meets others on this machine."""
    paths = os.pathsep.join(map(str, (TESTS.parent / "src", TESTS)))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def _run(
    script: str, arguments: list[str], variables: dict[str, str], streams: tuple[Path | None, Path | None]
) -> None:
    for descriptor, path in enumerate(streams, 1):
        if path:
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def start(
    script: Path | str, *arguments: object, output: Path | None = None, errors: Path | None = None
) -> BaseProcess:
    """The process of the main program ``script``; the files take what it prints."""
    words = [str(word) for word in arguments]
    process = SERVER.Process(target=_run, args=(str(script), words, environment(), (output, errors)))
    process.start()
    return process


def ends(processes: Sequence[BaseProcess], seconds: float) -> list[int | None]:
    """The exit codes of all; what still runs after ``seconds`` is killed."""
    for process in processes:
        process.join(seconds)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def output_of(code: str, *arguments: object, seconds: float = 600) -> str:
    """What the program ``code`` prints; one that fails is an assertion error with the end of what it said."""
    with tempfile.TemporaryDirectory() as name:
        script, output, errors = (Path(name) / file for file in ("program.py", "output", "errors"))
        script.write_text(code, encoding="utf-8")
        (code_of_exit,) = ends([start(script, *arguments, output=output, errors=errors)], seconds)
        assert code_of_exit == 0, f"exit code {code_of_exit}: {errors.read_text()[-3000:]}"
        return output.read_text()

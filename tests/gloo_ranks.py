"""Gloo processes on this machine, two or more: a test module runs its checks in all and compares what they found."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked import ends, environment, start

__all__ = ["RANKS", "Ranks", "environment", "work"]

RANKS = 2


def work(checks: Sequence[Callable[[int, Path], Any]]) -> None:
    """The main program of one process: run ``checks(rank, folder)`` and leave what they found in the folder."""
    rank, folder, seconds, ranks = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/init", rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds // 3)
    )
    results = {}
    for check in checks:
        try:
            results[check.__name__] = check(rank, folder)
        except Exception:
            results[check.__name__] = traceback.format_exc()
            break  # the other rank may wait for this one: nothing after it can be trusted
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


class Ranks:
    """Runs ``script`` as all processes, for ``seconds`` at most; ``ranks(check)`` is what each rank found."""

    def __init__(self, script: str, folder: Path, seconds: int, number: int = RANKS) -> None:
        self.folder = folder
        codes = ends([start(script, rank, folder, seconds, number) for rank in range(number)], seconds)
        assert codes == [0] * number
        self.results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(number)]

    def __call__(self, check: Callable[[int, Path], Any]) -> list[Any]:
        found = [result.get(check.__name__, "did not run: an earlier check failed") for result in self.results]
        failed = [value for value in found if isinstance(value, str)]
        assert not failed, "\n".join(failed)
        return found

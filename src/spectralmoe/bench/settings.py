"""Settings of a run of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """The device, threads and amount of a run.

    Attributes:
        dtypes: the first is the main one; suites that need no second use it alone.
        quick: small sizes, for a look and for the check in CI.
        keep_memory: this process keeps what it frees (``keep_freed_memory``).
    """

    device: torch.device
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    quick: bool = False
    threads: int = 2
    rounds: int = 25
    keep_memory: bool = False

"""Describes the machine that a result was measured on, and sets the number of threads."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from spectralmoe.version import __version__

__all__ = ["cpu_model", "describe_machine", "threads", "versions"]


def describe_machine() -> dict[str, Any]:
    """Return versions and hardware as JSON values, to be kept with every measured number.

    >>> sorted(describe_machine())
    ['cores', 'cpu', 'gpu', 'python', 'system', 'threads', 'torch']
    """
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, torch and this library; results of different versions are not put together.

    >>> list(versions())
    ['python', 'torch', 'spectralmoe']
    """
    return {"python": platform.python_version(), "torch": torch.__version__, "spectralmoe": __version__}


@cache
def cpu_model() -> str:
    """Return the processor's name and, on Linux, its model number; its architecture if the system knows no more."""
    if platform.system() == "Darwin":
        name = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        return name.stdout.strip() or platform.machine()
    listing = Path("/proc/cpuinfo")
    return _first_cpu(listing.read_text(encoding="utf-8")) if listing.exists() else platform.machine()


def _first_cpu(listing: str) -> str:
    """What ``/proc/cpuinfo`` says of the first processor; many processors share a name, so with the model number."""
    fields = dict(re.findall(r"^(.+?)[ \t]*:[ \t]*(.+)$", listing.partition("\n\n")[0], re.MULTILINE))
    name, model = fields.get("model name", platform.machine()), fields.get("model")
    return name if model is None else f"{name}, model {model}"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute on ``count`` threads inside a ``with`` block.

    >>> with threads(1):
    ...     torch.get_num_threads()
    1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

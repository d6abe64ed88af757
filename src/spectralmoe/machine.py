"""What a result was measured on."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

__all__ = ["describe_machine"]


def describe_machine() -> dict[str, Any]:
    """Versions and hardware, as JSON values to keep beside every figure.

    >>> sorted(describe_machine())
    ['cores', 'gpu', 'python', 'system', 'threads', 'torch']
    """
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }

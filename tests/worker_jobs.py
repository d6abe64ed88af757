"""Jobs for tests/compare/test_workers.py, in a module that other processes can import."""

from __future__ import annotations

import os
import time

from spectralmoe import UserError

__all__ = ["fail", "square"]


def square(number, progress):
    progress(0.5)
    return number**2, os.getpid()


def fail(number, progress):
    """Number 1 at once; the others work for 20 s unless they are stopped."""
    if number == 1:
        raise UserError("number 1 is refused")
    for _ in range(1000):
        time.sleep(0.02)
        progress(0.1)

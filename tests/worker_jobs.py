"""Jobs for tests/experiments/test_workers.py, in a module that other processes can import."""

from __future__ import annotations

import os
import signal
import time

import torch

from spectralmoe import UserError

__all__ = ["count_threads", "die", "fail", "square"]


def count_threads(progress):
    return torch.get_num_threads()


def square(number, progress):
    progress(0.5)
    return number**2, os.getpid()


def die(number, progress):
    """As if the kernel had killed the process for want of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number, progress):
    """Number 1 at once; the others work for hours unless they are stopped."""
    if number == 1:
        raise UserError("number 1 is refused")
    for _ in range(10**6):
        time.sleep(0.02)
        progress(0.1)

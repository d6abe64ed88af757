"""Memory that is kept is not mapped a second time."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from spectralmoe.bench import allocator
from spectralmoe.errors import UserError

PAGES_OF_A_LATER_TENSOR = """
import ctypes, resource, sys, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # pages of 4 KiB, whatever the machine prefers (PR_SET_THP_DISABLE)
from spectralmoe.bench.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))  # the first ones may meet a small piece that was cut from the memory before them
"""


def pages(how):
    line = [sys.executable, "-c", PAGES_OF_A_LATER_TENSOR, how]
    return int(subprocess.run(line, capture_output=True, text=True, check=True).stdout)


@pytest.mark.full
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_later_tensor_takes_the_memory_of_an_earlier_one():
    assert pages("keep") < 100 < pages("give back")


def test_another_c_library_is_refused(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    with pytest.raises(UserError, match="another C library"):
        allocator.keep_freed_memory()

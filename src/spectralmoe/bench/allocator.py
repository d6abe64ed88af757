"""Settings of the C library's memory allocator, which influence all times measured on a CPU."""

from __future__ import annotations

import ctypes
import platform

from spectralmoe.errors import UserError

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # M_... in glibc's malloc.h


def keep_freed_memory() -> None:
    """Make this process keep the memory that it frees, and use it again.

    By default glibc maps every tensor beyond 32 MiB anew, and the kernel fills it page by page when it is first
    written, which takes about as long as a matmul of that size. Whether a tensor meets a free piece of the heap instead
    is luck, and it changes a ratio by a third. Allocators that keep what is freed (tcmalloc, jemalloc, torch's own on a
    GPU) have neither.

    Raises:
        UserError: another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        raise UserError("--keep-memory is a setting of glibc's allocator, and this Python runs on another C library")
    library = ctypes.CDLL(None)
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, -1)

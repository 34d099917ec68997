"""Large tensors reuse freed memory on Linux instead of being paged in anew for every operation."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep what is freed and to take no memory by ``mmap``, for the life of the process.

    A training step allocates and frees the same hundreds of megabytes over and over; by default every large tensor is
    mapped, zeroed page by page, and unmapped again. Does nothing where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20)):
            mallopt(option, value)

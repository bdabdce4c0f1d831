"""What the C library does with memory that is freed.

Every step of a training run allocates and frees the same hundreds of megabytes. glibc gives large blocks, and whatever
lies free at the top of its heap, back to the kernel, which hands them out again page by page and filled with zeros.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# Of mallopt, from malloc.h, and the largest block that may lie in the heap (DEFAULT_MMAP_THRESHOLD_MAX of glibc).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_BLOCK = 32 * 2**20


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees, for itself, until it ends; blocks above 32 MiB excepted.

    Returns:
        Whether that is possible: with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK))

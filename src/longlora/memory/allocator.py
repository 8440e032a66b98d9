"""Keeping freed memory on the CPU.

glibc returns every large block to the kernel as soon as it is freed and gets it back zeroed page by page. A training
step frees and takes hundreds of megabytes many times; on the two-core machine of docs/log.md keeping them made a step
about a quarter faster.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks for the next allocation of this process; false where there is no glibc."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))

"""What glibc does with memory that a step freed: keep it for the next, or give it back to the system.

A training step frees and takes hundreds of megabytes many times. Given back, every page comes again zeroed: slow. Kept,
nothing is zeroed, but small blocks pin the holes that large ones leave, and the process grows to a multiple of what is
alive at any moment (measured: docs/log.md). So memory is kept where there is plenty, and given back where it is short.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of glibc's mallopt.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_MMAP_MAX = 65536  # glibc's default
_RETURNED_FROM = 1 << 20
"""Bytes from which on a block is one mapping of its own, which goes back to the system when it is freed."""

KEPT_GROWTH = 4.0
"""Times its live tensors to which a process was seen to grow that keeps what it freed, with some room."""


def use_huge_pages() -> None:
    """Let torch ask for huge pages, which come zeroed in fewer steps; only before torch is imported."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> bool:
    """Keep freed blocks for the next allocation of this process; false where there is no glibc."""
    return _mallopt((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))


def return_freed_memory() -> bool:
    """Give freed blocks back to the system at once; false where there is no glibc."""
    return _mallopt((_M_MMAP_THRESHOLD, _RETURNED_FROM), (_M_MMAP_MAX, _MMAP_MAX), (_M_TRIM_THRESHOLD, _RETURNED_FROM))


def return_freed_memory_if_tight(peak: int | None, available: int) -> bool:
    """Give freed blocks back where keeping them might not fit; true if that was done.

    Args:
        peak: bytes of live tensors that are planned; None if nobody knows.
        available: bytes that this process can have.
    """
    tight = peak is None or KEPT_GROWTH * peak > available
    return tight and return_freed_memory()


def _mallopt(*settings: tuple[int, int]) -> bool:
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all(bool(mallopt(parameter, value)) for parameter, value in settings)

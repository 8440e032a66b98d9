"""How much memory this process uses, and running out of it as an error that can be explained, not as being killed."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def limited_memory(more: int) -> Iterator[None]:
    """Inside it, an allocation that takes this process over `more` bytes on top of what it has now fails.

    torch says then that it can't allocate memory. Where there is no such limit (not Linux) nothing is done.
    """
    # What RLIMIT_DATA counts: private writable memory, used or not.
    now = process_bytes("VmData") if sys.platform == "linux" else None
    if now is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [limit for limit in (now + more, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def process_bytes(name: str) -> int | None:
    """A size of this process in bytes, as Linux names it (``VmData``, ``VmRSS``, ``VmHWM``); None without /proc."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def peak_bytes() -> int:
    """The most memory in use so far: of torch's allocator on CUDA, else of this process."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    if (peak := process_bytes("VmHWM")) is not None:
        return peak
    # On Linux a process inherits this number from the one that started it.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

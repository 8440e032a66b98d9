"""How the time of a piece of work grows with its input: a ratio within one run, the same on a slow machine."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

LARGER = 16
LIMIT = 64
"""Between `LARGER`, where the work is linear, and its square, where it is quadratic."""
_TRIES = 3


def growth(work: Callable[[int], object], size: int) -> float:
    """How many times as long ``work(LARGER * size)`` takes as ``work(size)``.

    The quickest of interleaved runs, in this process's own time; no more of them once the ratio is under `LIMIT`.
    """
    small = large = ratio = float("inf")
    work(size)  # what is imported and compiled at a first call is not the input's doing
    for _ in range(_TRIES):
        small = min(small, _seconds(work, size))
        large = min(large, _seconds(work, LARGER * size))
        ratio = large / small
        print(f"growth {ratio:.1f}: {small:.4f} s, {large:.4f} s")
        if ratio < LIMIT:
            break
    return ratio


def _seconds(work: Callable[[int], object], size: int) -> float:
    gc.collect()
    gc.disable()  # it walks all objects of the process, at a time of its own
    try:
        began = time.process_time()
        work(size)
        return time.process_time() - began
    finally:
        gc.enable()

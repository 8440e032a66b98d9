"""How a duration is shown."""

from __future__ import annotations

import math


def clock(seconds: float) -> str:
    """``1:02:03``, ``2:03``, or ``?`` where it is not known.

    >>> clock(3723.4)
    '1:02:03'
    """
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

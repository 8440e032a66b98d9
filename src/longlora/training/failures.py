"""How several processes say what went wrong: the error that came first, once, and nobody talks over it.

The processes write their errors to the store of the launcher, which outlives them. An error that all have in common,
such as a bad recipe, is said by rank 0. One that a single process has is said by that process, with its rank. Those
that fail only because another is gone say so in one line, together.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any

from longlora.errors import InterruptedRunError
from longlora.training.distributed import Ranks

# Errors that all have in common come this close together, in seconds.
_TOGETHER = 2.0
# Lets a process that has an error of its own speak before those that lost contact to it.
_FIRST_WORD = 5.0
# The first process may keep the store, which the others still read.
_LAST_LOOK = 0.5


def report(ranks: Ranks, error: BaseException, message: str) -> None:
    """Print `message` of `error` on stderr as one line, unless another process of the run says it.

    Args:
        ranks: this process among several.
        error: what ended it.
        message: for a person; of what is a bug of ours the traceback.
    """
    # The launcher ends all processes when one has ended; the last words are said first.
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    store = _store()
    if isinstance(error, InterruptedRunError):  # agreed upon
        if ranks.is_main:
            _say("", message)
    elif is_lost_contact(error):
        _lost(store, ranks, error)
    elif store is None:
        _say(f"rank {ranks.rank}: ", message)
    else:
        _failed(store, ranks, message)


def is_lost_contact(error: BaseException) -> bool:
    """Whether `error` only says that another process does not answer."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error)
    return "gloo" in text or "Connection closed by peer" in text or "NCCL" in text


def _failed(store: Any, ranks: Ranks, message: str) -> None:
    """Say `message`, without a rank if it is everybody's."""
    _put(store, f"error/{ranks.rank}", message)
    deadline = time.monotonic() + _TOGETHER
    while time.monotonic() < deadline:
        found = [_get(store, f"error/{rank}") for rank in range(ranks.world)]
        others = [text for text in found if text is not None and text != message]
        if None not in found or others:
            break
        time.sleep(0.05)
    if all(text == message for text in found):
        if ranks.is_main:
            _say("", message)
    else:
        _say(f"rank {ranks.rank}: ", message)
    _put(store, "said", "yes")
    if ranks.is_main:
        time.sleep(_LAST_LOOK)


def _lost(store: Any, ranks: Ranks, error: BaseException) -> None:
    """One line for all processes that were left behind, after that of the process that failed."""
    _put(store, f"lost/{ranks.rank}", "yes")
    resume = "`longlora resume` goes on from the last whole checkpoint, if there is one"
    if store is not None and not _spoke(store, ranks.rank):  # what was just written is not there
        ended = "lost contact with rank 0, which kept the store of all and ended (killed, or out of memory)"
        _say(f"rank {ranks.rank}: ", f"{ended}; {resume}")
        return
    deadline = time.monotonic() + _FIRST_WORD
    while time.monotonic() < deadline and store is not None and _get(store, "said") is None:
        if all(_get(store, f"lost/{rank}") for rank in range(ranks.world)):
            break  # nobody has more to say
        time.sleep(0.1)
    silent = [rank for rank in range(ranks.world) if store is not None and not _spoke(store, rank)]
    if not _first(store, "left behind"):
        return
    if silent and _get(store, "said") is None:
        who = f"rank {', '.join(map(str, silent[:8]))}, which ended without a word (killed, or out of memory)"
    else:
        who = "the others"
    # Where all fail alike, by a wrong address for example, what the library says is all there is.
    words = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    _say(f"rank {ranks.rank}: ", f"lost contact with {who}; {resume} ({words})")


def _spoke(store: Any, rank: int) -> bool:
    return _get(store, f"error/{rank}") is not None or _get(store, f"lost/{rank}") is not None


def _say(who: str, message: str) -> None:
    if not message.startswith("Traceback"):
        message = " ".join(message.split())
    print(f"longlora: {who}{message}", file=sys.stderr, flush=True)


def _store() -> Any:
    """The launcher's key-value store, or else that of the process group; None where there is neither."""
    with contextlib.suppress(Exception):  # whatever is wrong with it, what is to be said is said without it
        from torch import distributed
        from torch.distributed import distributed_c10d

        dist: Any = distributed
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            tcp = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
        elif dist.is_initialized():
            tcp = distributed_c10d._get_default_store()
        else:  # before the processes joined: the first one keeps the store, as it would have
            host, port, first = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), os.environ["RANK"] == "0"
            wait = timedelta(seconds=5)
            tcp = dist.TCPStore(host, port, is_master=first, timeout=wait, wait_for_workers=False)
        return dist.PrefixStore(f"longlora/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)
    return None


def _put(store: Any, key: str, value: str) -> None:
    with contextlib.suppress(Exception):
        store.set(key, value)


def _get(store: Any, key: str) -> str | None:
    with contextlib.suppress(Exception):
        return str(store.get(key).decode()) if store.check([key]) else None
    return None


def _first(store: Any, key: str) -> bool:
    """Whether this process is the first to ask; true where there is no store."""
    with contextlib.suppress(Exception):
        return int(store.add(key, 1)) == 1
    return True

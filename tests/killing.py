"""Child processes that are killed (SIGKILL) at a chosen moment, and what they leave in a folder.

Children are forked from a server that imported everything once, so that a hundred of them take seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree", "os.truncate"}
"""Audit events around which what is on the disk changes."""
_WAIT_SECONDS = 120

Job = Callable[[Any], None]


def fork_server(preload: str) -> Any:
    """The context whose children are forked from a process that imported `preload`, a module beside this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    before = dict(os.environ)
    # The server looks for modules where a fresh Python does, and passes over what it does not find.
    os.environ |= {"PYTHONPATH": str(Path(__file__).parent), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _child(job: Job, argument: Any, kill_at: int | None, parent: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    seen = 0

    def hook(event: str, _arguments: object) -> None:
        nonlocal seen
        if event in _CHANGES:
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    parent.send("ready")
    sys.addaudithook(hook)
    job(argument)
    parent.send(seen)


def _start(job: Job, argument: Any, kill_at: int | None = None) -> tuple[BaseProcess, Connection]:
    """A child that is about to begin."""
    context = fork_server("fault_jobs")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, argument, kill_at, theirs), daemon=True)
    process.start()
    theirs.close()
    assert ours.poll(_WAIT_SECONDS), "the child does not begin"
    assert ours.recv() == "ready"
    return process, ours


def _end(process: BaseProcess, seconds: float = _WAIT_SECONDS) -> None:
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"a child did not end within {seconds} s")


def run_whole(job: Job, argument: Any, seconds: float = _WAIT_SECONDS) -> tuple[int, float]:
    """Let a child do `job`: how many changes it made on the disk, and the seconds it took."""
    process, child = _start(job, argument)
    began = time.monotonic()
    _end(process, seconds)
    assert process.exitcode == 0, f"the child ended with {process.exitcode}"
    return int(child.recv()), time.monotonic() - began


def kill_at_change(job: Job, argument: Any, number: int) -> bool:
    """Kill a child before its change `number` (from 1) on the disk; whether it came so far."""
    process, _ = _start(job, argument, number)
    _end(process)
    assert process.exitcode in (0, -signal.SIGKILL), f"the child ended with {process.exitcode}"
    return process.exitcode != 0


def kill_after(job: Job, argument: Any, seconds: float) -> bool:
    """Kill a child some time after its job began; whether it was still at work."""
    process, _ = _start(job, argument)
    process.join(seconds)
    alive = process.is_alive()
    process.kill()
    _end(process)
    return alive


def files_in(folder: Path) -> dict[str, bytes]:
    """What lies in `folder`, hidden files too: relative path -> content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

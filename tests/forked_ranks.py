"""Several processes of `longlora` forked from one that imported everything, with what torchrun would tell each of them.

Starting Python and importing torch takes each process of a real launch longer than a tiny run does.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import launch_trouble
import torch
import torch.distributed as dist
from killing import fork_server

from longlora.cli.app import main
from longlora.training import trainer  # noqa: F401  # which the command line imports when it is needed


def fork_server_of_ranks() -> Any:
    """The context whose children have what this module imports."""
    return fork_server("forked_ranks")


def run_forked(
    arguments: list[str], processes: int, environment: dict[str, str], folder: Path, seconds: float
) -> tuple[int, str, str]:
    """``longlora ARGUMENTS`` in each; the first code that is not 0, and what all printed.

    Args:
        environment: of the processes, whole.
        folder: for what they print.

    Raises:
        TimeoutError: they took longer than `seconds`, and were killed; the message has what they printed.
    """
    context = fork_server_of_ranks()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared = environment | own | {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    printed = [folder / "stdout", folder / "stderr"]
    for path in printed:
        path.touch()
    ranks: list[Any] = [
        context.Process(
            target=_rank, args=(arguments, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, *map(str, printed))
        )
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()
    try:
        code = _first_failure(ranks, time.monotonic() + seconds)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    out, err = (path.read_text(encoding="utf-8") for path in printed)
    if code is None:
        raise TimeoutError(f"longlora {' '.join(arguments)} took over {seconds} s\n{out}\n{err}")
    return code, out, err


def _first_failure(ranks: list[Any], deadline: float) -> int | None:
    """0 once all ended well, None at the deadline; where one fails, the others are told to end, as torchrun does."""
    failed = 0
    while time.monotonic() < deadline:
        codes = [rank.exitcode for rank in ranks]
        if not failed and (failed := next((code for code in codes if code), 0)):
            for rank in ranks:
                rank.terminate()
        if None not in codes:
            return failed
        time.sleep(0.02)
    return failed or None


def _rank(arguments: list[str], environment: dict[str, str], *printed: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in zip((1, 2), printed, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
    torch.set_num_threads(1)
    sys.argv = ["longlora", *arguments]
    if "TROUBLE" in environment:
        launch_trouble.run()
    else:
        main()

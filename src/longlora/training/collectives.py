"""What the processes of a run do together: join, agree, and let the first one decide for all.

Without a launcher there is one process, and every function here answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from longlora import errors
from longlora.errors import LongLoraError, RecipeError
from longlora.training.distributed import Ranks

T = TypeVar("T")
# Longer than the first process takes to write the optimizer's states of a large model, while the others wait. A process
# that ends is noticed at once: its connections break, and its launcher ends the others.
_PATIENCE = timedelta(minutes=30)
_SHOWN = 3


def join(ranks: Ranks) -> None:
    """Connect all processes of the run: gloo, and NCCL where there is CUDA. Each GPU belongs to one process.

    Raises:
        RecipeError: this machine has fewer GPUs than processes.
    """
    if torch.cuda.is_available():
        if ranks.local_rank >= torch.cuda.device_count():
            raise RecipeError(
                f"local rank {ranks.local_rank} has no GPU, this machine has {torch.cuda.device_count()}: start one "
                "process for each GPU (torchrun --nproc-per-node)"
            )
        if ranks.world > 1:
            torch.cuda.set_device(ranks.local_rank)
    if ranks.world == 1 or dist.is_initialized():
        return
    # By name, because libraries would take MPI or oneCCL where torch has them. gloo beside NCCL is for words and files.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)


def leave() -> None:
    """Disconnect, once no process waits for another any more."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def from_main(ranks: Ranks, work: Callable[[], T]) -> T:
    """What ``work()`` gives on the first process, on all of them; its error too, so that all say the same.

    The result is a plain value, such as a path or a recipe.

    Raises:
        LongLoraError: `work` raised it on the first process.
    """
    if ranks.world == 1:
        return work()
    sent: list[Any] = [None, None, ""]
    if ranks.is_main:
        try:
            sent[0] = work()
        except LongLoraError as error:
            sent[1:] = [type(error).__name__, str(error)]
    dist.broadcast_object_list(sent, src=0, device=torch.device("cpu"))
    result, kind, message = sent
    if kind is not None:
        raise getattr(errors, kind, LongLoraError)(message)
    return result  # type: ignore[no-any-return]


def largest(ranks: Ranks, number: float) -> float:
    """The largest of the numbers of all processes; -x gives the smallest."""
    if ranks.world == 1:
        return number
    found = torch.tensor(number, dtype=torch.float64)  # on the CPU: gloo
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item()


def gathered(ranks: Ranks, value: T) -> list[T]:
    """The plain values of all processes, by rank."""
    if ranks.world == 1:
        return [value]
    everywhere: list[Any] = [None] * ranks.world
    dist.all_gather_object(everywhere, value)
    return everywhere


def require_same(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """Refuse on every process, with the same words, where `facts` of one are not those of the first.

    Args:
        ranks: this process.
        facts: name -> value, for example ``train.steps`` -> ``20``.

    Raises:
        RecipeError: they differ; the message names what and the rank.
    """
    everywhere = gathered(ranks, dict(facts))
    first = everywhere[0]
    for rank, found in enumerate(everywhere):
        differing = [name for name in {**first, **found} if first.get(name) != found.get(name)]
        if differing:
            named = "; ".join(
                f"{name} is {found.get(name, 'missing')} there and {first.get(name, 'missing')} on rank 0"
                for name in differing[:_SHOWN]
            )
            more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
            raise RecipeError(
                f"rank {rank} would train something else than rank 0: {named}{more}; start all processes with the "
                "same recipe, data and base model"
            )

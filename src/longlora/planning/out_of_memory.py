"""What to say when memory runs out in training: the part that was planned to take most, and the next lever to pull."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from longlora.config import CHANGEABLE_ON_RESUME, Recipe
from longlora.errors import ModelError, one_line
from longlora.memory.limit import limited_memory
from longlora.planning.levers import Lever, levers
from longlora.planning.machines import free_memory
from longlora.planning.memory import Memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is the way torch or Python say that there is no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


@contextlib.contextmanager
def explained_out_of_memory(
    recipe: Recipe,
    memory: Memory | None,
    device: torch.device,
    *,
    step: Callable[[], int],
    resumable: Callable[[], bool],
    processes: int = 1,
) -> Iterator[None]:
    """Inside it, running out of memory raises a `ModelError` of one line; the rest is as in `explain_out_of_memory`.

    On a CPU an allocation that the machine has no memory for fails, where the kernel would else kill the process.

    Args:
        processes: of the run on this machine, each of which may take an equal part of what is free.
    """
    cpu = device.type == "cpu"
    try:
        with limited_memory(free_memory(swap=True, processes=processes)) if cpu else contextlib.nullcontext():
            yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        line = explain_out_of_memory(error, recipe, memory, device, step(), resumable=resumable())
        raise ModelError(line) from error


def explain_out_of_memory(
    error: BaseException, recipe: Recipe, memory: Memory | None, device: torch.device, step: int, *, resumable: bool
) -> str:
    """One line: what happened, the largest part, and what to do.

    Args:
        memory: what was planned; None if it was not.
        step: of the run, from 1; 0 before the first.
        resumable: whether there is a whole checkpoint.
    """
    left = levers(recipe, cuda=device.type == "cuda")
    what = one_line(error, 160)
    when = f"in step {step}" if step else "before the first step"
    line = f"out of memory on {device.type} {when} ({what}) at {recipe.context.context_length:,} tokens"
    if memory is not None:
        largest = _largest_that_moves(memory)
        line += f"; planned were {memory.peak / 1e9:.2f} GB, most of it {largest.replace('_', ' ')} "
        line += f"({memory.parts[largest] / 1e9:.2f} GB)"
        left = [lever for lever in left if largest in lever.eases] or left
    return f"{line}: {_remedy(left[0] if left else None, resumable)}"


def _largest_that_moves(memory: Memory) -> str:
    """The largest part but for the process itself."""
    parts = {name: size for name, size in memory.parts.items() if name not in ("process", "allocator")}
    return max(parts, key=parts.__getitem__)


def _remedy(lever: Lever | None, resumable: bool) -> str:
    if lever is None:
        return "no lever is left, lower context.context_length or take a machine with more memory"
    if not resumable:
        return f"train again with {lever} (there is no checkpoint yet)"
    if all(key.removeprefix("train.") in CHANGEABLE_ON_RESUME for key in lever.settings):
        return f"resume with {lever} (whole checkpoints are intact)"
    return f"train in another run_dir with {lever}; whole checkpoints are intact"

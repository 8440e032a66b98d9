"""What to say when memory runs out in training: the part that was planned to take most, and the next lever to pull."""

from __future__ import annotations

import torch

from longlora.config import CHANGEABLE_ON_RESUME, Recipe
from longlora.planning.levers import Lever, levers
from longlora.planning.memory import Memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is the way torch or Python say that there is no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def explain_out_of_memory(
    error: BaseException, recipe: Recipe, memory: Memory | None, device: torch.device, step: int
) -> str:
    """One line: what happened, the largest part, and what to do.

    Args:
        memory: what was planned; None if it could not be.
    """
    left = levers(recipe, cuda=device.type == "cuda")
    what = " ".join(str(error).split())[:160] or "no message"
    line = f"out of memory on {device.type} in step {step} ({what}) at {recipe.context.context_length:,} tokens"
    if memory is not None:
        largest = _largest_that_moves(memory)
        line += f"; planned were {memory.peak / 1e9:.2f} GB, most of it {largest.replace('_', ' ')} "
        line += f"({memory.parts[largest] / 1e9:.2f} GB)"
        left = [lever for lever in left if largest in lever.eases] or left
    return f"{line}: {_remedy(left[0] if left else None)}"


def _largest_that_moves(memory: Memory) -> str:
    """The largest part but for the process itself."""
    parts = {name: size for name, size in memory.parts.items() if name not in ("process", "allocator")}
    return max(parts, key=parts.__getitem__)


def _remedy(lever: Lever | None) -> str:
    if lever is None:
        return "no lever is left, lower context.context_length or take a machine with more memory"
    if all(key.removeprefix("train.") in CHANGEABLE_ON_RESUME for key in lever.settings):
        return f"resume with {lever} (whole checkpoints are intact)"
    return f"train in another run_dir with {lever}; whole checkpoints are intact"

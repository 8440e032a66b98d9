"""Machines that a run can be planned for: GPUs by name, and this one.

Peaks are the makers' numbers for dense bf16 products with float32 sums. What of them training reaches is
`_UTILISATION`: the LongLoRA paper's own hours for Llama-2-7B on A100 (table 12, LoRA and LongLoRA, 8k to 64k tokens)
are explained within 7% by 46% of the peak in linear layers and 68% in attention scores (FlashAttention-2), where
recomputation is counted and pairs that causality forbids are not. For other GPUs both are assumptions.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from longlora.errors import PlanError
from longlora.memory.limit import process_bytes

_UTILISATION = 0.46
_SCORE_UTILISATION = 0.68
_CUDA_CONTEXT = 600 * 2**20
_GPU_ALLOCATOR = 0.05
_CPU_PROCESS = 520 * 2**20
# With freed memory given back: see `longlora.memory.allocator`. A run for which that is tight does give it back.
_CPU_ALLOCATOR = 0.03


@dataclass(frozen=True)
class Machine:
    """What one device does and holds. Rates are what a training step reaches, not peaks."""

    name: str
    memory_bytes: int
    linear_flops: float
    """FLOP/s in the layers without attention scores; the pointwise work beside the products is in it."""
    score_flops: float
    """FLOP/s of attention scores and weighted sums."""
    head_flops: float
    """FLOP/s of the output head with its loss."""
    bandwidth: float
    """Bytes/s of memory: what the optimizer is bound by."""
    process_bytes: int
    allocator_share: float
    """What allocator and kernels take beside tensors, as a part of these."""
    count: int = 1
    """Devices that train together, each on sequences of its own."""
    cuda: bool = True
    """Whether what needs CUDA can be used."""
    present: bool = False
    """Whether it is the machine that plans."""
    host_bytes: int = sys.maxsize
    """Main memory beside that of a GPU, where it is known."""
    basis: str = ""
    """Where the rates come from, in words."""


# Peak bf16 FLOP/s, bytes/s, GB of memory.
_GPUS = {
    "a10g": (70e12, 600e9, 24),
    "a100-40g": (312e12, 1555e9, 40),
    "a100-80g": (312e12, 2039e9, 80),
    "b200": (2250e12, 8000e9, 180),
    "h100-80g": (989e12, 3350e9, 80),
    "h200": (989e12, 4800e9, 141),
    "l4": (121e12, 300e9, 24),
    "l40s": (362e12, 864e9, 48),
    "mi300x": (1307e12, 5300e9, 192),
    "rtx3090": (71e12, 936e9, 24),
    "rtx4090": (165e12, 1008e9, 24),
    "rtx5090": (210e12, 1792e9, 32),
}


def gpu(name: str, count: int = 1) -> Machine:
    """`count` GPUs of a kind.

    Raises:
        PlanError: the kind is unknown, or the count is not positive.
    """
    if count < 1:
        raise PlanError(f"--gpus {count}: must be at least 1")
    if name not in _GPUS:
        raise PlanError(f"--gpu {name} is unknown: give one of {', '.join(_GPUS)}")
    peak, bandwidth, memory = _GPUS[name]
    return Machine(
        name=name,
        memory_bytes=int(memory * 1e9),
        linear_flops=peak * _UTILISATION,
        score_flops=peak * _SCORE_UTILISATION,
        head_flops=peak * _UTILISATION,
        bandwidth=bandwidth,
        process_bytes=_CUDA_CONTEXT,
        allocator_share=_GPU_ALLOCATOR,
        count=count,
        basis=f"{_UTILISATION:.0%} of {peak / 1e12:.0f} TFLOP/s ({_SCORE_UTILISATION:.0%} in scores), as in table 12",
    )


def this_machine() -> Machine:
    """The present GPU or CPU with its free memory; its rates are guesses until `calibrate` measured them."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        guess = 100e12
        return Machine(
            name=torch.cuda.get_device_name(),
            memory_bytes=free,
            linear_flops=guess * _UTILISATION,
            score_flops=guess * _SCORE_UTILISATION,
            head_flops=guess * _UTILISATION,
            bandwidth=1e12,
            process_bytes=0,  # what is free is counted with a CUDA context in place
            allocator_share=_GPU_ALLOCATOR,
            present=True,
            host_bytes=available_memory(),
            basis="not measured",
        )
    cores = torch.get_num_threads()
    guess = 20e9 * cores
    return Machine(
        name=f"this CPU ({cores} threads)",
        memory_bytes=available_memory(),
        linear_flops=guess,
        score_flops=guess,
        head_flops=guess,
        bandwidth=5e9,
        process_bytes=_CPU_PROCESS,
        allocator_share=_CPU_ALLOCATOR,
        cuda=False,
        present=True,
        basis="not measured",
    )


def with_memory(machine: Machine, gigabytes: float) -> Machine:
    """The same machine with another amount of memory, in GB of 10^9 bytes."""
    if gigabytes <= 0:
        raise PlanError(f"--memory {gigabytes}: must be more than 0 GB")
    return replace(machine, memory_bytes=int(gigabytes * 1e9))


def available_memory() -> int:
    """Bytes that this process can have in all without swapping: its own, and what is free."""
    return (process_bytes("VmRSS") or 0) + free_memory()


def free_memory(*, swap: bool = False) -> int:
    """Bytes that this process can have beside its own: what the machine and its control groups leave.

    Args:
        swap: count free swap space too.
    """
    swapped = _numbers(Path("/proc/meminfo"), ":").get("SwapFree", 0) * 1024 if swap else 0
    return min([_free() + swapped, *_left_by_cgroups()])


def _free() -> int:
    kibibytes = _numbers(Path("/proc/meminfo"), ":").get("MemAvailable")
    return kibibytes * 1024 if kibibytes else int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _left_by_cgroups() -> Iterator[int]:
    """What is left below the limit of each control group of this process (version 2, then 1) and of its parents."""
    own = _lines(Path("/proc/self/cgroup"))
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in own if line.count(":") > 1)}
    for root, path, limit, used, cache in (
        ("", paths.get(""), "memory.max", "memory.current", "inactive_file"),
        ("memory", paths.get("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        if path is None:
            continue
        top = Path("/sys/fs/cgroup") / root
        for folder in [top / path.strip("/"), *(top / path.strip("/")).parents]:
            text = "".join(_lines(folder / limit)).strip()
            if folder.is_relative_to(top) and text.isdigit():  # and not "max"
                held = int("".join(_lines(folder / used)).strip() or 0)
                yield max(0, int(text) - held + _numbers(folder / "memory.stat", " ").get(cache, 0))


def _numbers(path: Path, separator: str) -> dict[str, int]:
    """First numbers of lines such as ``SwapFree:  123 kB``."""
    pairs = (line.split(separator, 1) for line in _lines(path) if separator in line)
    return {name: int(rest.split()[0]) for name, rest in pairs if rest.split() and rest.split()[0].isdigit()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []

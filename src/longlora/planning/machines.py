"""Machines that a run can be planned for: GPUs by name, and this one.

Peaks are the makers' numbers for dense bf16 products with float32 sums. What of them training reaches is
`_UTILISATION`: the LongLoRA paper's own hours for Llama-2-7B on A100 (table 12, LoRA and LongLoRA, 8k to 64k tokens)
are explained within 7% by 46% of the peak in linear layers and 68% in attention scores (FlashAttention-2), where
recomputation is counted and pairs that causality forbids are not. For other GPUs both are assumptions. What messages
between GPUs reach (`_LINK_UTILISATION`) is one for all of them, and no hardware was at hand to check it.
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
_PER_NODE = 8
# Part of the links' numbers that large messages reach: an assumption.
_LINK_UTILISATION = 0.7
_GPU_ALLOCATOR = 0.05
_CPU_PROCESS = 520 * 2**20
# With freed memory given back: see `longlora.memory.allocator`. A run for which that is tight does give it back.
_CPU_ALLOCATOR = 0.03


@dataclass(frozen=True)
class Links:
    """What joins the devices. Rates are bytes/s that one device sends, as messages reach them."""

    devices: int
    """Of one node."""
    within: float
    """To devices of its node."""
    between: float
    """To those of other nodes, while all devices of its node send as well."""


# Processes of one machine that talk through its memory by gloo: a guess.
_LOOPBACK = Links(2**20, 1e9, 1e9)


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
    """Devices that train together: all of them, on all nodes."""
    cuda: bool = True
    """Whether what needs CUDA can be used."""
    present: bool = False
    """Whether it is the machine that plans."""
    host_bytes: int = sys.maxsize
    """Main memory beside that of a GPU, where it is known."""
    basis: str = ""
    """Where the rates come from, in words."""
    links: Links = _LOOPBACK

    @property
    def processes(self) -> int:
        """Of one node: those that share its main memory."""
        return min(self.count, self.links.devices)


# Of a device, by what joins them: bytes/s to its node, bytes/s to other nodes; the makers' numbers of one direction.
# NVLink 3, 4 and 5 with 200 and 400 Gb/s of network for each GPU (DGX A100, H100, B200); Infinity Fabric; PCIe 4 and 5
# with 100 Gb/s for the eight of a node.
_NVLINK_3 = (300e9, 25e9)
_NVLINK_4 = (450e9, 50e9)
_NVLINK_5 = (900e9, 50e9)
_INFINITY_FABRIC = (448e9, 50e9)
_PCIE_4 = (32e9, 100e9 / 8 / _PER_NODE)
_PCIE_5 = (64e9, 100e9 / 8 / _PER_NODE)

# Peak bf16 FLOP/s, bytes/s, GB of memory, links.
_GPUS = {
    "a10g": (70e12, 600e9, 24, _PCIE_4),
    "a100-40g": (312e12, 1555e9, 40, _NVLINK_3),
    "a100-80g": (312e12, 2039e9, 80, _NVLINK_3),
    "b200": (2250e12, 8000e9, 180, _NVLINK_5),
    "h100-80g": (989e12, 3350e9, 80, _NVLINK_4),
    "h200": (989e12, 4800e9, 141, _NVLINK_4),
    "l4": (121e12, 300e9, 24, _PCIE_4),
    "l40s": (362e12, 864e9, 48, _PCIE_4),
    "mi300x": (1307e12, 5300e9, 192, _INFINITY_FABRIC),
    "rtx3090": (71e12, 936e9, 24, _PCIE_4),
    "rtx4090": (165e12, 1008e9, 24, _PCIE_4),
    "rtx5090": (210e12, 1792e9, 32, _PCIE_5),
}


def gpu(name: str, count: int = 1) -> Machine:
    """`count` GPUs of a kind, eight in a node.

    Raises:
        PlanError: the kind is unknown, or the count is not positive.
    """
    if count < 1:
        raise PlanError(f"--gpus {count}: must be at least 1")
    if name not in _GPUS:
        raise PlanError(f"--gpu {name} is unknown: give one of {', '.join(_GPUS)}")
    peak, bandwidth, memory, (within, between) = _GPUS[name]
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
        links=Links(_PER_NODE, _LINK_UTILISATION * within, _LINK_UTILISATION * between),
    )


def this_machine(processes: int = 1, here: int | None = None) -> Machine:
    """The present GPU or CPU with its free memory; its rates are guesses until `calibrate` measured them.

    Args:
        processes: of the run, which train together.
        here: those of them on this machine, which share its main memory; None for all. Each is counted with an equal
            part of what is free, so all of them have to ask before the first one takes any, or after all did.
    """
    here = processes if here is None else here
    links = replace(_LOOPBACK, devices=max(here, 1))
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
            count=processes,
            present=True,
            host_bytes=available_memory(here),
            basis="not measured",
            links=links,
        )
    cores = torch.get_num_threads()
    guess = 20e9 * cores
    return Machine(
        name=f"this CPU ({cores} threads)",
        memory_bytes=available_memory(here),
        linear_flops=guess,
        score_flops=guess,
        head_flops=guess,
        bandwidth=5e9,
        process_bytes=_CPU_PROCESS,
        allocator_share=_CPU_ALLOCATOR,
        count=processes,
        cuda=False,
        present=True,
        basis="not measured",
        links=links,
    )


def has_bfloat16_products() -> bool:
    """Whether this CPU multiplies matrices in bfloat16 by itself; elsewhere torch converts number by number."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def with_memory(machine: Machine, gigabytes: float) -> Machine:
    """The same machine with another amount of memory, in GB of 10^9 bytes."""
    if gigabytes <= 0:
        raise PlanError(f"--memory {gigabytes}: must be more than 0 GB")
    return replace(machine, memory_bytes=int(gigabytes * 1e9))


def available_memory(processes: int = 1) -> int:
    """Bytes that this process can have in all without swapping: its own, and its part of what is free."""
    return (process_bytes("VmRSS") or 0) + free_memory(processes=processes)


def free_memory(*, swap: bool = False, processes: int = 1) -> int:
    """Bytes that this process can have beside its own: what the machine and its control groups leave.

    Args:
        swap: count free swap space too.
        processes: on this machine that share it equally.
    """
    swapped = _numbers(Path("/proc/meminfo"), ":").get("SwapFree", 0) * 1024 if swap else 0
    return min([_free() + swapped, *_left_by_cgroups()]) // processes


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

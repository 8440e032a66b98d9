"""What a process can have: the machine's free memory, or what its control groups leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from longlora.planning import machines

FILES = {
    "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\nSwapFree: 1000 kB\n",
}


def available(monkeypatch: pytest.MonkeyPatch, **files: str) -> tuple[int, int, int]:
    """Available, free, and free with swap, in KiB."""
    texts = FILES | files
    monkeypatch.setattr(machines, "process_bytes", {"VmRSS": 500 * 1024}.get)
    monkeypatch.setattr(machines, "_lines", lambda path: texts.get(str(path), "").splitlines())
    return (
        machines.available_memory() // 1024,
        machines.free_memory() // 1024,
        machines.free_memory(swap=True) // 1024,
    )


def test_without_limits_it_is_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available(monkeypatch) == (8500, 8000, 9000)


@pytest.mark.parametrize("place", ["", "/slice", "/slice/job"])
def test_a_limit_of_any_parent_group_counts(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    group = f"/sys/fs/cgroup{place}"
    files = {
        "/proc/self/cgroup": "0::/slice/job\n",
        f"{group}/memory.max": str(4000 * 1024),
        f"{group}/memory.current": str(3000 * 1024),
        f"{group}/memory.stat": f"anon {2000 * 1024}\ninactive_file {700 * 1024}\n",
    }
    assert available(monkeypatch, **files) == (2200, 1700, 1700)
    assert available(monkeypatch, **files | {f"{group}/memory.max": "max\n"}) == (8500, 8000, 9000)


def test_the_older_version_of_control_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    group = "/sys/fs/cgroup/memory/docker/abc"
    files = {
        "/proc/self/cgroup": "4:memory:/docker/abc\n1:cpu:/\n",
        f"{group}/memory.limit_in_bytes": str(4000 * 1024),
        f"{group}/memory.usage_in_bytes": str(3500 * 1024),
        f"{group}/memory.stat": f"total_inactive_file {100 * 1024}\n",
    }
    assert available(monkeypatch, **files) == (1100, 600, 600)


def test_of_this_very_machine() -> None:
    total = machines._numbers(Path("/proc/meminfo"), ":").get("MemTotal")
    if total is None:
        pytest.skip("no /proc")
    assert 0 < machines.free_memory() < machines.available_memory() < 2 * total * 1024

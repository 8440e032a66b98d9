"""Mutated inputs for a reader, read in a child process with bounded memory: what comes out, and how long it takes.

Every input follows from the seed and its number, so that a finding is repeated by naming both.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from killing import fork_server

MEMORY_BYTES = 2 * 2**30
"""Address space that a reader may take on top of what the process has before."""
SECONDS = 1.0
"""Processor time for one input."""
_SHOWN_FINDINGS = 10
_SPECIAL = [
    b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b"'", b"{", b"}", b"[", b"]", b"<", b">", b"&",
    b"*a", b"&a ", b"!!bool ", b"!!python/object:os.system ", b": ", b"- ", b"\\u0000", b"\\ud800", b"\n", b"\r",
    b"\t", b"#", b"%", b"NaN", b"-Infinity", b"1e999", b"-1", b"9" * 5000, b"0" * 300, b"true", b"null", b"../",
    b"/etc/passwd", b"~nobody/",
]  # fmt: skip
_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "x" * 100_000, "\0", "\ud800", "é" * 50, "../../x", "/etc/passwd", "~nobody/x", "nan", [], {}, [[]],
    [None], {"": None}, ["x"] * 3000, "[" * 200, "{{ x }}", "<s>", "\u202e", "-" * 40,
]  # fmt: skip


def mutated(draw: random.Random, seeds: list[bytes]) -> bytes:
    """One of `seeds` with some changes; a JSON one is mostly changed as JSON, so that it still is."""
    data = draw.choice(seeds)
    if draw.random() < 0.5 and (changed := _mutated_json(draw, data)) is not None:
        return changed
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        data = draw.choice(_BYTE_CHANGES)(draw, data, seeds)
    return data


def _place(draw: random.Random, data: bytes) -> int:
    return draw.randrange(len(data) + 1)


def _flip(draw: random.Random, data: bytes, _seeds: list[bytes]) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(draw.choice((1, 1, 4, 32))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(draw: random.Random, data: bytes, _seeds: list[bytes]) -> bytes:
    return data[: _place(draw, data)]


def _drop(draw: random.Random, data: bytes, _seeds: list[bytes]) -> bytes:
    start = _place(draw, data)
    return data[:start] + data[start + draw.choice((1, 2, 8, 64)) :]


def _put(draw: random.Random, data: bytes, _seeds: list[bytes]) -> bytes:
    start = _place(draw, data)
    return data[:start] + draw.choice(_SPECIAL) * draw.choice((1, 1, 1, 3)) + data[start + draw.choice((0, 0, 1, 4)) :]


def _splice(draw: random.Random, data: bytes, seeds: list[bytes]) -> bytes:
    other = draw.choice(seeds)
    return data[: _place(draw, data)] + other[_place(draw, other) :]


def _repeat(draw: random.Random, data: bytes, _seeds: list[bytes]) -> bytes:
    start = _place(draw, data)
    return data[:start] + data[start : start + draw.choice((1, 16, 256))] * draw.choice((2, 10, 100)) + data[start:]


def _nest(draw: random.Random, data: bytes, _seeds: list[bytes]) -> bytes:
    start = _place(draw, data)
    return data[:start] + draw.choice((b"[", b'{"a":', b"- ", b"<div>")) * draw.choice((20, 200, 5000)) + data[start:]


def _numbers(draw: random.Random, data: bytes, _seeds: list[bytes]) -> bytes:
    """Eight bytes that are a number at its limits, for binary headers."""
    start, width = _place(draw, data), draw.choice((1, 2, 4, 8))
    value = draw.choice((0, 1, -1, 2 ** (8 * width - 1) - 1, -(2 ** (8 * width - 1)), draw.randrange(100)))
    return data[:start] + value.to_bytes(width, "little", signed=True) + data[start + width :]


def _encoding(draw: random.Random, data: bytes, _seeds: list[bytes]) -> bytes:
    return data.decode("utf-8", "replace").encode(draw.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig")))


_BYTE_CHANGES: list[Callable[[random.Random, bytes, list[bytes]], bytes]] = [
    _flip, _flip, _cut, _drop, _put, _put, _splice, _repeat, _nest, _numbers, _encoding,
]  # fmt: skip


def _mutated_json(draw: random.Random, data: bytes) -> bytes | None:
    """`data` with one or two of its JSON values changed; of lines, those of one line."""
    lines = data.split(b"\n") if data.count(b"\n{") else [data]
    number = draw.randrange(len(lines))
    try:
        value = json.loads(lines[number])
    except ValueError:
        return None
    for _ in range(draw.choice((1, 1, 2))):
        value = _changed(draw, value)
    lines[number] = json.dumps(value).encode()
    return b"\n".join(lines)


def _changed(draw: random.Random, value: Any) -> Any:
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        node = waiting.pop()
        keys: Iterable[Any] = (
            node.keys() if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        )
        for key in keys:
            places.append((node, key))
            waiting.append(node[key])
    if not places or draw.random() < 0.02:
        return copy.deepcopy(draw.choice(_VALUES))
    parent, key = draw.choice(places)
    kind = draw.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[draw.choice(("", "x", "\0", f"{key}_", "auto_map", "x" * 500))] = parent.pop(key)
    elif kind == 2:
        other, name = draw.choice(places)
        parent[key] = json.loads(json.dumps(other[name])) if isinstance(other, dict) and name in other else None
    else:
        # A copy: lists in it are changed by the next change, and would stay changed for the inputs that follow.
        parent[key] = copy.deepcopy(draw.choice(_VALUES))
    return value


@dataclass
class Outcome:
    """What came of all inputs of one reader."""

    inputs: int = 0
    refused: int = 0
    slowest: float = 0.0
    slowest_input: int = -1
    findings: dict[str, str] = field(default_factory=dict)
    """Where in the code and which error -> the input and its traceback; anything but our own errors."""
    peak_bytes: int = 0

    def summary(self) -> str:
        return (
            f"{self.inputs:,} inputs, {self.refused:,} refused, {len(self.findings)} findings, slowest "
            f"{self.slowest:.2f} s (input {self.slowest_input}), peak {self.peak_bytes / 2**20:.0f} MiB"
        )


def fuzz(reader: str, inputs: int, seed: int, limit_seconds: float) -> Outcome:
    """Give `inputs` mutated inputs to a reader of `fuzz_readers.READERS` in a child process."""
    context = fork_server("fault_jobs")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(reader, inputs, seed, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(limit_seconds), f"{reader}: no result within {limit_seconds} s"
        outcome: Outcome = ours.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"{reader}: the child died with {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    return outcome


def _child(name: str, inputs: int, seed: int, parent: Connection) -> None:
    import torch
    from fuzz_readers import READERS

    from longlora.errors import LongLoraError

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        reader = READERS[name](folder)
        for data in reader.seeds:  # good ones; and what is imported at the first call is not an input's doing
            reader.read(data)
        _limit_memory()
        outcome = Outcome()
        for number in range(inputs):
            data = mutated(random.Random(f"{seed}:{number}"), reader.seeds)
            began = time.process_time()
            try:
                reader.read(data)
            except LongLoraError:
                outcome.refused += 1
            except BaseException as error:
                _note(outcome, number, error)
            took = time.process_time() - began
            if took > outcome.slowest:
                outcome.slowest, outcome.slowest_input = took, number
            outcome.inputs += 1
        outcome.peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        parent.send(outcome)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _note(outcome: Outcome, number: int, error: BaseException) -> None:
    frames = traceback.extract_tb(error.__traceback__)
    last = next((frame for frame in reversed(frames) if "longlora" in frame.filename), frames[-1])
    key = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
    if key not in outcome.findings and len(outcome.findings) < _SHOWN_FINDINGS:
        text = "".join(traceback.format_exception(error, limit=-6))
        outcome.findings[key] = f"input {number}: {text[-2500:]}"

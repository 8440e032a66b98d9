"""Writing that leaves the old or the new, never half of it: files, folders, a lock, and room on the disk.

What is being written has a name that begins with a dot and ends in eight random characters, and is locked (flock) by
the process that writes it. The kernel lets go of the lock when that process dies, so the next writer of the same name
can tell what a killed one left behind, and removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from longlora.errors import RunFolderError, one_line

_MARK = "longlora-"
_RANDOM = re.compile(r"[a-z0-9_]{8}")  # what tempfile puts behind its prefix
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Rust and C++ keep the number of the error in the text alone; numpy only says how much of an array was written.
_FULL_TEXT = re.compile(
    r"os error (28|122|27)\b|No space left|Disk quota exceeded|File too large|requested and \d+ written"
)
_LEAST_FREE = 16 * 2**20
_held: set[str] = set()
_log = logging.getLogger("longlora")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the whole new one, also after a crash.

    Text is written as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(path)
    descriptor, temporary = _temporary(path, folder=False)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content.encode("utf-8") if isinstance(content, str) else content)
            handle.flush()
            os.fsync(handle.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync([path.parent])


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `path` only when the block ends without an error.

    Raises:
        RunFolderError: `path` exists, or the disk is full.
    """
    if path.exists():
        raise RunFolderError(f"output folder {path} already exists: name another one or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(path)
    descriptor, temporary = _temporary(path, folder=True)
    try:
        yield temporary
        temporary.chmod(0o755)
        sync(entry for entry in temporary.rglob("*") if entry.is_file() or entry.is_dir())
        sync([temporary])
        temporary.replace(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, Exception) and is_disk_full(error):
            free = shutil.disk_usage(path.parent).free
            raise RunFolderError(
                f"{path} cannot be written ({one_line(error)}; {gibibytes(free)} free): free the disk or "
                "name another place; nothing of it was left"
            ) from error
        raise
    finally:
        os.close(descriptor)
    sync([path.parent])


def put_folder(source: Path, target: Path) -> None:
    """Give the folder `source` the name `target` on the same disk; what had that name is removed afterwards.

    Killed between its two renames, nothing has the name `target`; what was there is removed by the next writer of it.
    """
    _remove_left_behind(target)
    if target.is_symlink():
        target.unlink()
    if not target.exists():
        source.replace(target)
        return
    descriptor, aside = _temporary(target, folder=True)
    try:
        target.replace(aside)
        try:
            source.replace(target)
        except BaseException:
            aside.replace(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Whether a library says, in its own way, that there is no room on the disk (or in the user's part of it)."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return isinstance(error, OSError | RuntimeError | SafetensorError) and bool(_FULL_TEXT.search(str(error)))


def require_free_space(folder: Path, bytes_needed: float, what: str) -> None:
    """Refuse before work begins what cannot be written in the end.

    Args:
        folder: where it is written; need not exist yet.
        bytes_needed: what will be written, estimated from below, so that nothing is refused that would fit.
        what: names it in the message.

    Raises:
        RunFolderError: there is less room; the message names both sizes.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < bytes_needed + _LEAST_FREE:
        raise RunFolderError(
            f"{what} needs about {gibibytes(bytes_needed)} in {folder}, and {gibibytes(free)} are free there: free "
            "space or choose a place on another disk"
        )


def gibibytes(count: float) -> str:
    """A number of bytes for a person."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 100 else f"{count / 2**20:.2f} MiB"


def without_home(text: str) -> str:
    """`text` with the home folder written as ``~``: what is shown to others does not tell a user's name."""
    home = str(Path.home())
    return text if home in ("", "/") else re.sub(rf"(?<![\w/.-]){re.escape(home)}(?![\w-]|\.\w)", "~", text)


@contextlib.contextmanager
def exclusive(path: Path, place: str, what: str) -> Iterator[None]:
    """Hold the lock file `path` alone; within this process it may be taken again inside.

    The kernel releases it when the process ends, however it ends, so a lock is never left over. On NFS that needs the
    server's lock service; where a file system has no locks at all, a warning is logged and nothing is locked. A process
    that was forked meanwhile holds the lock too, until it ends.

    Args:
        place: what is locked, for the message.
        what: what the holder does, for the message of whom it keeps out.

    Raises:
        RunFolderError: another process holds it; the message names it.
    """
    key = os.path.realpath(path)
    if key in _held:
        yield
        return
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _take(path, place)
    owner = {"process": os.getpid(), "host": socket.gethostname(), "doing": what, "since": time.strftime("%F %T")}
    _held.add(key)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        yield
    finally:
        _held.discard(key)
        path.unlink(missing_ok=True)
        os.close(descriptor)
        if made:
            with contextlib.suppress(OSError):  # not empty: something was written
                path.parent.rmdir()


def _take(path: Path, place: str) -> int:
    """A descriptor of `path` that is locked, and still has that name: its last holder may have removed it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(descriptor)
            os.close(descriptor)
            raise RunFolderError(
                f"{place} is in use by {owner}: wait until it ends, stop it, or choose another folder"
            ) from None
        except OSError as error:
            _log.warning("%s cannot be locked (%s): make sure that no other process writes there", place, error)
            return descriptor
        if _has_name(descriptor, path):
            return descriptor
        os.close(descriptor)


def _owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return f"{owner['doing']} (process {owner['process']} on {owner['host']}, since {owner['since']})"
    except (ValueError, KeyError, TypeError):  # it is being written
        return "another process"


def _temporary(path: Path, *, folder: bool) -> tuple[int, Path]:
    """A descriptor, locked, of a new file or folder beside `path`, and its name."""
    while True:
        if folder:
            temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.{_MARK}"))
            descriptor = os.open(temporary, os.O_RDONLY)
        else:
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{_MARK}")
            temporary = Path(name)
        with contextlib.suppress(OSError):  # no locks here: nobody removes it, or what a killed process left
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _has_name(descriptor, temporary):
            return descriptor, temporary
        os.close(descriptor)  # taken for left behind before it was locked


def _has_name(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _remove_left_behind(path: Path) -> None:
    """Remove what killed writers of `path` left beside it."""
    prefix = f".{path.name}.{_MARK}"
    with os.scandir(path.parent) as entries:
        found = [Path(entry.path) for entry in entries if entry.name.startswith(prefix)]
    for old in found:
        if _RANDOM.fullmatch(old.name.removeprefix(prefix)) and not old.is_symlink() and _is_abandoned(old):
            _log.info("removed %s, which a process that was killed left behind", old)
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:  # held, or there are no locks here and nobody can tell
        return False
    finally:
        os.close(descriptor)


def sync(paths: Iterable[Path]) -> None:
    """Bring files or folders to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""Locks that no killed process keeps, and what is left behind by one."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from fault_jobs import hold_lock
from killing import _end, _start

from longlora import storage
from longlora.artifacts import RunFolder, lock_output
from longlora.errors import RunFolderError
from longlora.storage import exclusive, new_folder, put_folder, require_free_space, without_home, write_atomic


class TestLock:
    def test_the_second_process_is_refused_and_a_killed_one_lets_go(self, tmp_path: Path) -> None:
        run = RunFolder(tmp_path / "run")
        process, _ = _start(hold_lock, run.root)
        limit = time.monotonic() + 60
        while not (run.root / "locked").exists() and time.monotonic() < limit:
            time.sleep(0.02)
        with pytest.raises(RunFolderError) as caught, run.lock("longlora prepare"):
            pass
        message = str(caught.value)
        assert f"run folder {run.root} is in use by longlora train (process {process.pid} on " in message
        assert message.endswith("wait until it ends, stop it, or choose another folder")
        process.kill()
        _end(process)
        left = json.loads((run.root / ".lock").read_text())
        assert left["process"] == process.pid, "the file of a killed holder stays, and holds nobody up"
        with run.lock("longlora prepare"):
            assert json.loads((run.root / ".lock").read_text())["process"] == os.getpid()
        assert sorted(path.name for path in run.root.iterdir()) == ["locked"]

    def test_it_may_be_taken_again_inside(self, tmp_path: Path) -> None:
        run = RunFolder(tmp_path)
        with run.lock("quickstart"):
            with run.lock("longlora train"):
                assert (tmp_path / ".lock").exists()
            assert (tmp_path / ".lock").exists(), "the inner one does not let go for the outer one"
        assert not list(tmp_path.iterdir())

    def test_a_refused_run_leaves_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no"), RunFolder(tmp_path / "run").lock("longlora prepare"):
            raise ValueError("no")
        assert not list(tmp_path.iterdir())

    def test_variants_are_locked_one_by_one(self, tmp_path: Path) -> None:
        run = RunFolder(tmp_path)
        with run.lock_evaluation("base", "a"), run.lock_evaluation("trained", "b"), lock_output(run.merged, "c"):
            assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 3
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    @pytest.mark.parametrize("name", [".", "..", "/"])
    def test_an_output_that_exists_is_not_locked(self, name: str) -> None:
        with pytest.raises(RunFolderError, match="already exists"):
            lock_output(Path(name), "longlora export")

    def test_where_there_are_no_locks_it_is_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def none(_descriptor: int, _operation: int) -> None:
            raise OSError(37, "No locks available")

        monkeypatch.setattr(fcntl, "flock", none)
        with caplog.at_level(logging.WARNING, "longlora"), RunFolder(tmp_path).lock("longlora train"):
            pass
        assert "cannot be locked ([Errno 37] No locks available): make sure that no other process" in caplog.text


class TestLeftBehind:
    def test_what_a_killed_writer_left_is_removed_and_what_a_live_one_writes_is_not(self, tmp_path: Path) -> None:
        for name in (".out.longlora-abcd1234", ".out.longlora-zz_z1234"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "half").write_text("x")
        (tmp_path / ".a.json.longlora-abcd1234").write_text("{")
        kept = [".out.txt", ".out.metadata", ".out.longlora-abcd12345", ".other.abcd1234", "out.abcd1234"]
        for name in kept:
            (tmp_path / name).write_text("mine")
        with new_folder(tmp_path / "out") as first:
            (first / "a").touch()
            assert not (tmp_path / ".out.longlora-abcd1234").exists()
            assert not (tmp_path / ".out.longlora-zz_z1234").exists()
            with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "out") as second:
                (second / "b").touch()
                (tmp_path / "out").mkdir()
                (tmp_path / "out" / "c").touch()
                assert first.exists(), "another writer is at work there"
            (tmp_path / "out" / "c").unlink()
        write_atomic(tmp_path / "a.json", "{}")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "out", "a.json"])
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]

    def test_a_failure_between_the_two_renames_puts_the_old_folder_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("old", "new"):
            (tmp_path / name).mkdir()
            (tmp_path / name / name).touch()
        rename = Path.replace

        def refuse(self: Path, target: Path) -> Path:
            if self.name == "new":
                raise OSError(5, "Input/output error")
            return rename(self, target)

        monkeypatch.setattr(Path, "replace", refuse)
        with pytest.raises(OSError, match="Input/output"):
            put_folder(tmp_path / "new", tmp_path / "old")
        assert [path.name for path in (tmp_path / "old").iterdir()] == ["old"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/ann/models/a", "~/models/a"),
        ("- /home/ann/a.txt\n- '/home/ann'", "- ~/a.txt\n- '~'"),
        ("/home/anna/models", "/home/anna/models"),
        ("/data/home/ann/x", "/data/home/ann/x"),
        ("a hub/id", "a hub/id"),
        ("<td>/home/ann</td>&quot;/home/ann/x&quot; /home/ann.", "<td>~</td>&quot;~/x&quot; ~."),
        ("/home/ann.old/x /home/ann-2", "/home/ann.old/x /home/ann-2"),
    ],
)
def test_the_home_folder_is_not_told(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert without_home(text) == expected


def test_what_gets_its_name_is_on_the_disk_before_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        place = str(Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(tmp_path))
        order.append("sync " + re.sub(r"\.longlora-[a-z0-9_]{8}", "", place))
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> Path:
        order.append(f"rename to {target.name}")
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    write_atomic(tmp_path / "a.json", "{}")
    assert order == ["sync .a.json", "rename to a.json", "sync ."]
    order.clear()
    with new_folder(tmp_path / "out") as folder:
        (folder / "in").mkdir()
        (folder / "in" / "x").write_text("x")
    assert sorted(order[:-2]) == ["sync .out", "sync .out/in", "sync .out/in/x"]
    assert order[-2:] == ["rename to out", "sync ."]
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_a_lock_file_that_its_last_holder_removed_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened before the removal and locked after it, it would keep nobody out."""
    path, lock = tmp_path / ".lock", storage.fcntl.flock
    removed: list[int] = []

    def flock(descriptor: int, operation: int) -> None:
        lock(descriptor, operation)
        if not removed:
            removed.append(descriptor)
            path.unlink()

    monkeypatch.setattr(storage.fcntl, "flock", flock)
    with exclusive(path, "a folder", "a test"):
        assert path.exists(), "another process would make a new file and lock that"


def test_what_does_not_fit_is_refused_from_the_first_byte_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**30 + 16 * 2**20))
    require_free_space(tmp_path / "not" / "yet", 2**30, "it")
    with pytest.raises(RunFolderError, match="it needs about 1.00 GiB"):
        require_free_space(tmp_path, 2**30 + 1, "it")

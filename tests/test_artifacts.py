"""Files are whole or not there."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora.artifacts import (
    MANIFEST,
    RunFolder,
    new_folder,
    read_json,
    verify_manifest,
    write_atomic,
    write_json,
    write_manifest,
)
from longlora.errors import LongLoraError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def full_disk(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longlora.storage.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_nan_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_folder_appears_only_when_it_is_finished(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "whole").read_text() == "x"
    with pytest.raises(LongLoraError, match="already exists"), new_folder(tmp_path / "out"):
        pass
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["whole"]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: (f / "a").unlink(), "a is missing: REMEDY"),
        (lambda f: (f / "a").write_bytes(b"12"), "has 2 bytes, its manifest says 3: REMEDY"),
        (lambda f: (f / "a").write_bytes(b"124"), "does not match its sha256: REMEDY"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json does not exist: REMEDY"),
        (lambda f: (f / "manifest.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[]"), "names no files: REMEDY"),
        (lambda f: (f / "manifest.json").write_text('{"files": {"a": 3}}'), "REMEDY"),
    ],
)
def test_damage_is_found(tmp_path: Path, damage: object, expected: str) -> None:
    (tmp_path / "a").write_bytes(b"123")
    write_manifest(tmp_path, schema=1)
    assert verify_manifest(tmp_path, "REMEDY")["schema"] == 1
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(LongLoraError, match=expected):
        verify_manifest(tmp_path, "REMEDY")


_NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20)


@settings(max_examples=25, deadline=None)
@given(
    files=st.dictionaries(
        _NAMES.filter(lambda name: name not in (".", "..", MANIFEST)), st.binary(max_size=50), min_size=1, max_size=5
    ),
    facts=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none(), max_size=3),
    data=st.data(),
)
def test_any_change_of_any_file_is_found(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], facts: dict[str, object], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    facts = {f"fact {key}": value for key, value in facts.items()}
    write_manifest(folder, **facts)
    found = verify_manifest(folder, "REMEDY")
    assert found.pop("files").keys() == files.keys()
    assert found == facts
    name = data.draw(st.sampled_from(sorted(files)))
    content = files[name]
    change = data.draw(st.binary(max_size=60).filter(lambda other: other != content) | st.none())
    if change is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(change)
    with pytest.raises(LongLoraError, match="REMEDY"):
        verify_manifest(folder, "REMEDY")


def test_a_used_run_folder_is_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.require_unused()
    run.adapter.mkdir()
    with pytest.raises(LongLoraError, match="already holds adapter/"):
        run.require_unused()


def test_json_errors_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(LongLoraError, match="do this"):
        read_json(tmp_path / "none.json", "do this")
    (tmp_path / "bad.json").write_text(json.dumps({})[:-1])
    with pytest.raises(LongLoraError, match="do this"):
        read_json(tmp_path / "bad.json", "do this")

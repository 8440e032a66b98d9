"""A disk that is full while data or a model is written: one clear line, nothing half-written, earlier output intact.

RLIMIT_FSIZE stands for the disk: writing beyond it fails as on a full one, in Python, numpy and Rust alike. (A write
that fails so has errno EFBIG instead of ENOSPC; both are told by `storage.is_disk_full`.)
"""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from export_cases import tiny_base, trained_run
from fault_jobs import limited, prepare, recipe_file
from killing import files_in, run_whole
from safetensors import SafetensorError
from tiny import bear_texts

from longlora.errors import RunFolderError
from longlora.storage import is_disk_full, new_folder, require_free_space


def said(folder: Path, name: str, argument: object, most_bytes: int) -> str:
    path = folder / "said.txt"
    run_whole(limited, (name, argument, most_bytes, path))
    return path.read_text(encoding="utf-8")


def test_prepare_keeps_the_earlier_shards(tmp_path: Path, tiny_model_folder: Path) -> None:
    texts = bear_texts(tmp_path / "texts")
    old = recipe_file(tmp_path, tiny_model_folder, "old", [str(texts / "0.txt")], [str(texts / "1.txt")])
    run_whole(prepare, old)
    before = files_in(tmp_path / "run")
    new = recipe_file(tmp_path, tiny_model_folder, "new", [str(texts)], [str(texts / "1.txt")])
    message = said(tmp_path, "prepare", new, 4096)
    assert message.startswith("DataError: data.train: ")
    assert "run/data/train cannot be written" in message
    assert "free the disk or name another place" in message
    assert files_in(tmp_path / "run") == before


@pytest.mark.parametrize("most_bytes", [1000, 30_000, 120_000])
def test_merge_and_export_leave_nothing(tmp_path: Path, most_bytes: int) -> None:
    run, _ = trained_run(tmp_path / "run", tiny_base(tmp_path / "base"))
    before = files_in(run.root)
    for name, argument in (("merge", (run.adapter, run.merged)), ("export", (run.root, tmp_path / "out" / "model"))):
        message = said(tmp_path, name, argument, most_bytes)
        assert message.startswith("RunFolderError: "), message
        assert "cannot be written" in message
        assert "\n" not in message
        assert files_in(run.root) == before
        assert not files_in(tmp_path / "out") if (tmp_path / "out").exists() else True


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError("1000 requested and 488 written"), True),  # numpy
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("[enforce fail at inline_container.cc] . No space left on device"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (SafetensorError("Error while deserializing header: incomplete metadata"), False),
        (ValueError("No space left on device"), False),
    ],
)
def test_each_library_says_it_in_its_own_way(error: Exception, full: bool) -> None:
    assert is_disk_full(error) is full


def test_other_failures_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="denied"), new_folder(tmp_path / "out"):
        raise OSError(errno.EACCES, "denied")
    assert not list(tmp_path.iterdir())


def test_room_is_asked_for_before_work_begins(tmp_path: Path) -> None:
    require_free_space(tmp_path / "not" / "there" / "yet", 1000, "it")
    with pytest.raises(RunFolderError, match=r"the merged model needs about 1048576.00 GiB in .* are free there"):
        require_free_space(tmp_path, 2**50, "the merged model")
    assert not list(tmp_path.iterdir())

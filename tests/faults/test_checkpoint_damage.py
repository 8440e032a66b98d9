"""Every file of a checkpoint lost, cut, changed or taken from another one: passed over by name, no wrong result."""

from __future__ import annotations

import errno
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_jobs import FILES, made, mark_again, prepared, result, steps_saved
from rich.console import Console
from safetensors.torch import load_file, save_file

from longlora import artifacts
from longlora.artifacts import MANIFEST, RunFolder, read_json, write_manifest
from longlora.config import Recipe
from longlora.errors import LongLoraError, RunFolderError
from longlora.model.adapters import ADAPTER_WEIGHTS
from longlora.training.checkpoint import newest_checkpoint
from longlora.training.saved import CHECKSUM, checksum, saved_in
from longlora.training.trainer import train

QUIET = Console(quiet=True)
SEED = 20261129

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path
) -> tuple[Recipe, dict[str, torch.Tensor]]:
    """A run of four steps with checkpoints 2 and 4, and its result."""
    recipe = prepared(tmp_path_factory.mktemp("damage"), tiny_model_folder)
    train(recipe, QUIET)
    return recipe, result(recipe)


@pytest.fixture
def run(finished: tuple[Recipe, dict[str, torch.Tensor]], tmp_path: Path) -> RunFolder:
    """A copy of it to damage, without the result."""
    shutil.copytree(finished[0].run_path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    return RunFolder(tmp_path / "run")


def resumed(finished: tuple[Recipe, dict[str, torch.Tensor]], run: RunFolder) -> dict[str, torch.Tensor]:
    recipe = finished[0].model_copy(update={"run_dir": str(run.root)})
    train(recipe, QUIET, resume=True)
    return result(recipe)


def damages(
    good: Path, other: Path, path: Path, generator: random.Random
) -> Iterator[tuple[str, Callable[[], object]]]:
    """What can befall `path`, a copy of `good`; `other` is the same file of another checkpoint."""
    content = good.read_bytes()

    def flipped(place: int) -> bytes:
        return content[:place] + bytes([content[place] ^ 1 << generator.randrange(8)]) + content[place + 1 :]

    yield "deleted", path.unlink
    for name, size in (("emptied", 0), ("halved", len(content) // 2), ("one byte short", len(content) - 1)):
        yield name, lambda size=size: path.write_bytes(content[:size])
    yield "one byte long", lambda: path.write_bytes(content + b"\0")
    # The manifest protects all others; nothing but what is in it protects the manifest.
    count = 120 if good.name == MANIFEST else 4
    places = {0, len(content) - 1, *(generator.randrange(len(content)) for _ in range(count))}
    for place in sorted(places):
        yield f"bit flipped in byte {place}", lambda place=place: path.write_bytes(flipped(place))
    if other.read_bytes() != content:
        yield "taken from another checkpoint", lambda: shutil.copyfile(other, path)
    yield "a folder in its place", lambda: (path.unlink(), path.mkdir())
    yield "a link to nothing in its place", lambda: (path.unlink(), path.symlink_to("nowhere"))


def test_a_checkpoint_has_the_files_that_are_asked_for(run: RunFolder) -> None:
    assert {path.name for path in (run.checkpoints / "checkpoint-4").iterdir()} == {*FILES, MANIFEST}


def test_every_file_with_every_damage(run: RunFolder, tmp_path: Path) -> None:
    """The one before is used, and the damage is said by name; with both damaged nothing is used."""
    print(f"seed {SEED}")
    generator = random.Random(SEED)
    good, older, seen, unseen = tmp_path / "good", run.checkpoints / "checkpoint-2", 0, 0
    folder = run.checkpoints / "checkpoint-4"
    folder.rename(good)
    for name in (*FILES, MANIFEST):
        for what, damage in damages(good / name, older / name, folder / name, generator):
            shutil.copytree(good, folder)
            damage()
            if name == MANIFEST and _says_the_same(folder, good):
                unseen += 1  # in white space, or in the name of the checksum
            else:
                found, (line,) = newest_checkpoint(run.checkpoints, ADAPTER_WEIGHTS)
                assert found == older, (name, what)
                assert folder.name in line, (name, what, line)
                assert name in line or name == MANIFEST, (name, what, line)
                assert "\n" not in line
                assert line.endswith("passed over")
                assert len(line) < 600
            shutil.rmtree(folder)
            seen += 1
    assert seen > 80
    assert unseen < 10
    (older / "optimizer.pt").unlink()
    with pytest.raises(
        RunFolderError, match=r"no whole checkpoint \(.*checkpoint-2/optimizer.pt is missing.*remove it"
    ):
        newest_checkpoint(run.checkpoints, ADAPTER_WEIGHTS)


def _says_the_same(folder: Path, good: Path) -> bool:
    """Whether a manifest that was changed says what it said."""
    try:
        return newest_checkpoint(folder.parent, ADAPTER_WEIGHTS)[0] == folder and saved_in(folder) == saved_in(good)
    except RunFolderError:
        return False


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"schema": 2}, "schema is not right"),
        ({"schema": "1"}, "schema is not right"),
        ({"step": 5}, "is of step 5, not 4"),
        ({"step": "4"}, "step is not right"),
        ({"step": 4.0}, "step is not right"),
        ({"step": True}, "step is not right"),
        ({"step": None}, "step is not right"),
        ({"batches": {"rows": 1, "steps": 0, "processes": 1}}, "batches.steps is not right"),
        ({"batches": {"rows": 1, "steps": 2.5, "processes": 1}}, "batches.steps is not right"),
        ({"batches": {"rows": True, "steps": 2, "processes": 1}}, "batches.rows is not right"),
        ({"batches": {"rows": "1", "steps": 2, "processes": 1}}, "batches.rows is not right"),
        ({"batches": {"rows": 1, "steps": 2}}, "batches.processes is not right"),
        ({"batches": [1, 2, 1]}, "batches is not right"),
        ({"processes": 0}, "processes is not right"),
        ({"processes": 2}, r"has no rng_state_0.pth, rng_state_1.pth"),
        ({"unlogged": {"since": 4, "sums": []}}, "unlogged.sums is not right"),
        ({"unlogged": {"since": 4, "sums": ["0"]}}, "unlogged.sums.0 is not right"),
        ({"source": {"base model": 3}}, "source.base model is not right"),
    ],
)
def test_a_manifest_with_other_types_or_steps_is_passed_over(
    run: RunFolder, facts: dict[str, object], message: str
) -> None:
    path = run.checkpoints / "checkpoint-4" / MANIFEST
    said = {key: value for key, value in {**read_json(path, ""), **facts}.items() if key != CHECKSUM}
    digest = checksum({key: value for key, value in said.items() if key != "files"})
    path.write_text(json.dumps({**said, CHECKSUM: digest}), encoding="utf-8")
    found, passed_over = newest_checkpoint(run.checkpoints, ADAPTER_WEIGHTS)
    assert found.name == "checkpoint-2"
    with pytest.raises(RunFolderError, match=message):
        raise RunFolderError(passed_over[0])


@pytest.mark.parametrize("name", [name for name in FILES if name != "adapter_config.json"])
def test_a_state_that_the_manifest_never_had_is_missed_too(run: RunFolder, name: str) -> None:
    """As in one that was put together by hand."""
    folder = run.checkpoints / "checkpoint-4"
    (folder / name).unlink()
    mark_again(folder)
    found, (line,) = newest_checkpoint(run.checkpoints, ADAPTER_WEIGHTS)
    assert found.name == "checkpoint-2"
    assert line == f"{folder} has no {name}: passed over"


def test_a_manifest_without_its_checksum_is_passed_over(run: RunFolder) -> None:
    folder = run.checkpoints / "checkpoint-4"
    facts = {key: value for key, value in read_json(folder / MANIFEST, "").items() if key not in ("files", CHECKSUM)}
    write_manifest(folder, **facts)
    found, (line,) = newest_checkpoint(run.checkpoints, ADAPTER_WEIGHTS)
    assert found.name == "checkpoint-2"
    assert line == f"{folder / MANIFEST} does not match its own {CHECKSUM}: passed over"


@pytest.mark.parametrize("name", ["batches", "processes", "source", "step"])
def test_a_manifest_without_a_fact_is_passed_over(run: RunFolder, name: str) -> None:
    mark_again(run.checkpoints / "checkpoint-4", **{name: None})
    found, (line,) = newest_checkpoint(run.checkpoints, ADAPTER_WEIGHTS)
    assert found.name == "checkpoint-2"
    assert f"{name} is not right" in line


@pytest.mark.parametrize("state", [{"global_step": 3}, {"global_step": "4"}, {"global_step": 4.0}, {}, [4], None])
def test_a_state_of_another_step_is_passed_over(run: RunFolder, state: object) -> None:
    folder = run.checkpoints / "checkpoint-4"
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    mark_again(folder)
    found, (line,) = newest_checkpoint(run.checkpoints, ADAPTER_WEIGHTS)
    assert found.name == "checkpoint-2"
    assert "trainer_state.json is of step" in line


def test_a_folder_under_another_name_is_no_checkpoint_of_that_step(run: RunFolder) -> None:
    (run.checkpoints / "checkpoint-4").rename(run.checkpoints / "checkpoint-6")
    found, (line,) = newest_checkpoint(run.checkpoints, ADAPTER_WEIGHTS)
    assert found.name == "checkpoint-2"
    assert "is of step 4, not 6" in line
    for name in ("checkpoint-²", "checkpoint-04", "checkpoint--4", "checkpoint-4.5"):
        shutil.copytree(run.checkpoints / "checkpoint-2", run.checkpoints / name)
    assert newest_checkpoint(run.checkpoints, ADAPTER_WEIGHTS)[0].name == "checkpoint-2"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "optimizer.pt" else pytest.mark.slow) for name in FILES]
)
def test_a_resumed_run_is_the_undisturbed_one_whatever_was_damaged(
    finished: tuple[Recipe, dict[str, torch.Tensor]], run: RunFolder, name: str
) -> None:
    path = run.checkpoints / "checkpoint-4" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    again = resumed(finished, run)
    assert all(torch.equal(tensor, again[name]) for name, tensor in finished[1].items())
    # It was replaced as a whole.
    assert newest_checkpoint(run.checkpoints, ADAPTER_WEIGHTS) == (run.checkpoints / "checkpoint-4", [])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("optimizer.pt", {"state": {}, "param_groups": []}),
        ("optimizer.pt", [1, 2]),
        ("optimizer.pt", b"no file of torch"),
        ("scheduler.pt", 7),
        ("rng_state.pth", {"python": 1}),
        ("rng_state.pth", {"python": (3, (1, 2), None), "numpy": 0, "cpu": torch.zeros(3)}),
        ("trainer_state.json", b'{"global_step": 2, "of a later version": 1}'),
        (ADAPTER_WEIGHTS, b"no tensors"),
    ],
)
def test_states_that_do_not_fit_are_refused_in_one_line(
    finished: tuple[Recipe, dict[str, torch.Tensor]], run: RunFolder, name: str, content: object
) -> None:
    """The manifest is right about them: somebody made it anew."""
    shutil.rmtree(run.checkpoints / "checkpoint-4")
    folder = run.checkpoints / "checkpoint-2"
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        torch.save(content, folder / name)
    mark_again(folder)
    with pytest.raises(RunFolderError, match=rf"the states in {folder} do not fit the run .*: remove that folder"):
        resumed(finished, run)
    assert not run.adapter.exists()


def test_an_adapter_that_lacks_a_tensor_is_refused(
    finished: tuple[Recipe, dict[str, torch.Tensor]], run: RunFolder
) -> None:
    """The manifest is right about it, and the library would train that part anew."""
    folder = run.checkpoints / "checkpoint-4"
    weights = load_file(folder / ADAPTER_WEIGHTS)
    lost = next(name for name in weights if "lora_B" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, folder / ADAPTER_WEIGHTS)
    mark_again(folder)
    with pytest.raises(RunFolderError, match=rf"checkpoint-4 .*lacks {lost}"):
        resumed(finished, run)


def test_other_data_than_the_checkpoint_saw_is_refused(
    finished: tuple[Recipe, dict[str, torch.Tensor]], run: RunFolder
) -> None:
    write_manifest(
        run.train_shard, **{k: v for k, v in read_json(run.train_shard / MANIFEST, "").items() if k != "files"}, more=1
    )
    with pytest.raises(LongLoraError, match=r"checkpoint-4 was saved with another training data \(data/train\) than"):
        resumed(finished, run)


def test_what_a_killed_save_left_is_removed_and_never_counts(
    finished: tuple[Recipe, dict[str, torch.Tensor]], run: RunFolder
) -> None:
    shutil.rmtree(run.checkpoints / "checkpoint-4")
    left = made(run.checkpoints, 4)
    (left / "rng_state_7.pth").write_bytes(b"of eight processes")
    older = shutil.copytree(left, run.checkpoints / "checkpoint-3")  # as the library by itself would leave it
    again = resumed(finished, run)
    assert all(torch.equal(tensor, again[name]) for name, tensor in finished[1].items())
    recipe = finished[0].model_copy(update={"run_dir": str(run.root)})
    assert steps_saved(recipe) == ["checkpoint-2", "checkpoint-4"]
    assert not older.exists()
    assert not (run.checkpoints / "checkpoint-4" / "rng_state_7.pth").exists()


def test_what_a_killed_rotation_left_goes_even_after_the_last_step(
    finished: tuple[Recipe, dict[str, torch.Tensor]], run: RunFolder
) -> None:
    """One that lost its manifest first, and one that was not come to: no further save would remove them."""
    for step, removed in ((1, (MANIFEST, "optimizer.pt")), (0, ())):
        folder = shutil.copytree(run.checkpoints / "checkpoint-2", run.checkpoints / f"checkpoint-{step}")
        for name in removed:
            (folder / name).unlink()
    again = resumed(finished, run)
    assert all(torch.equal(tensor, again[name]) for name, tensor in finished[1].items())
    recipe = finished[0].model_copy(update={"run_dir": str(run.root)})
    assert steps_saved(recipe) == ["checkpoint-2", "checkpoint-4"]


def test_a_file_that_cannot_be_read_is_passed_over(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad sector, or a server that does not answer any more."""
    bad = run.checkpoints / "checkpoint-4" / "optimizer.pt"
    read = artifacts.sha256_file

    def failing(path: Path) -> str:
        if path == bad:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(artifacts, "sha256_file", failing)
    found, (line,) = newest_checkpoint(run.checkpoints, ADAPTER_WEIGHTS)
    assert found.name == "checkpoint-2"
    assert "optimizer.pt cannot be read (Input/output error): passed over" in line


def test_fewer_steps_than_were_done_are_refused(
    finished: tuple[Recipe, dict[str, torch.Tensor]], run: RunFolder
) -> None:
    recipe = finished[0].model_copy(
        update={"run_dir": str(run.root), "train": finished[0].train.model_copy(update={"steps": 3})}
    )
    shutil.rmtree(run.adapter, ignore_errors=True)
    with pytest.raises(RunFolderError, match=r"checkpoint-4 has more steps than train.steps=3: give train.steps=4"):
        train(recipe, Console(quiet=True), resume=True)
    assert (run.checkpoints / "checkpoint-2").exists()

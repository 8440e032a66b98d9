"""What the children of `killing.py` do; imported once by the server they are forked from."""

from __future__ import annotations

import contextlib
import json
import os
import resource
from pathlib import Path
from typing import Any

from checkpoint_jobs import train_or_resume
from rich.console import Console

from longlora.artifacts import RunFolder
from longlora.config import build_recipe, dump_recipe, load_recipe
from longlora.data.prepare import prepare_shards
from longlora.errors import LongLoraError
from longlora.model.build import load_tokenizer, tokenizer_hash
from longlora.model.export import export_run
from longlora.model.merge import merge_adapter


def recipe_file(folder: Path, model: Path, name: str, train: list[str], heldout: list[str]) -> Path:
    """A recipe for `folder`/run in `folder`/`name`.yaml."""
    values = {
        "run_dir": str(folder / "run"),
        "model": {"name_or_path": str(model)},
        "context": {"context_length": 128},
        "data": {"train": train, "heldout": heldout},
    }
    path = folder / f"{name}.yaml"
    path.write_text(dump_recipe(build_recipe(values)), encoding="utf-8")
    return path


def prepare(recipe_file: Path) -> None:
    """``longlora prepare`` of a recipe."""
    recipe = load_recipe(recipe_file)
    tokenizer = load_tokenizer(recipe.model)
    prepare_shards(recipe, tokenizer, tokenizer_hash(tokenizer), Console(quiet=True))


def train(run_dir: Path) -> None:
    """``longlora train --or-resume`` of a prepared run folder."""
    if RunFolder(run_dir).trained.exists():
        return
    words = train_or_resume(run_dir)
    if words != "done":
        (run_dir / "refused.txt").write_text(words, encoding="utf-8")
        raise SystemExit(3)


def soak(paths: tuple[Path, Path]) -> None:
    """`train` of a run folder; after each checkpoint a row of what the process holds is added to a file."""
    from longlora.training.loop import LongContextTrainer

    run_dir, samples = paths
    save = LongContextTrainer._save_checkpoint

    def noted(self: Any, *arguments: Any) -> None:
        save(self, *arguments)
        row = {"step": self.state.global_step, **_held(run_dir)}
        with samples.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")

    LongContextTrainer._save_checkpoint = noted  # type: ignore[method-assign]
    train(run_dir)


def _held(run_dir: Path) -> dict[str, int]:
    """Resident memory in bytes, open files and threads of this process; files of the run and their bytes."""
    sizes = [path.stat().st_size for path in run_dir.rglob("*") if path.is_file()]
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return {
        "resident": pages * os.sysconf("SC_PAGE_SIZE"),
        "open_files": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        "threads": sum(1 for _ in Path("/proc/self/task").iterdir()),
        "files": len(sizes),
        "bytes": sum(sizes),
    }


def merge(paths: tuple[Path, Path]) -> None:
    """``longlora merge`` of an adapter folder into an output folder."""
    merge_adapter(*paths)


def export(paths: tuple[Path, Path]) -> None:
    """``longlora export`` of a run folder into an output folder."""
    run = RunFolder(paths[0])
    export_run(run, load_recipe(run.recipe), paths[1])


def hold_lock(run_dir: Path) -> None:
    """Hold the lock of a run folder until killed."""
    import time

    with RunFolder(run_dir).lock("longlora train"):
        (run_dir / "locked").touch()
        time.sleep(60)


_JOBS = {"prepare": prepare, "merge": merge, "export": export}


def limited(arguments: tuple[str, object, int, Path]) -> None:
    """A job whose files may have so many bytes at most, as on a full disk; what it says is left in a file."""
    name, argument, most_bytes, said = arguments
    for stream in (1, 2):  # what is printed may be a file as well
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    message = "done"
    try:
        _JOBS[name](argument)  # type: ignore[operator]
    except LongLoraError as error:
        message = f"{type(error).__name__}: {error}"
    except BaseException as error:
        message = f"TRACEBACK {type(error).__name__}: {error}"
    with contextlib.suppress(OSError):
        said.write_text(message, encoding="utf-8")

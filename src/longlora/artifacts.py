"""The run folder: the only file that names what is written, and how it is written safely.

A run folder holds, in the order in which a run makes it::

    recipe.yaml                      the resolved recipe
    data/train/  data/heldout/       token shards (tokens.bin, offsets.bin, mask.bin of instructions, manifest.json)
    metrics.jsonl                    one row per logged step
    checkpoints/checkpoint-N/        trainer state; complete once manifest.json is there
    adapter/                         LoRA + embeddings + norms, and longlora.json (RoPE, S2-Attn, base model)
    merged/                          an ordinary Hugging Face model; after full fine-tuning training writes it itself,
                                     with longlora.json and manifest.json, and there is no adapter/
    eval/VARIANT.json                rows measured for base, rope_only and trained
    eval/VARIANT.samples.jsonl       the same, a line each as soon as it is measured
    eval/VARIANT.harness.json        rows of standard benchmarks
    report.html  report.md  results.json
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longlora.errors import RunFolderError

MANIFEST = "manifest.json"
SIDECAR = "longlora.json"
TOKENS = "tokens.bin"
OFFSETS = "offsets.bin"
LOSS_MASK = "mask.bin"


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run folder; makes nothing by itself."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def train_shard(self) -> Path:
        return self.root / "data" / "train"

    @property
    def heldout_shard(self) -> Path:
        return self.root / "data" / "heldout"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    @property
    def trained(self) -> Path:
        """What training wrote, with a sidecar in it: adapter/, or merged/ after full fine-tuning."""
        return self.merged if (self.merged / SIDECAR).exists() else self.adapter

    @property
    def report_html(self) -> Path:
        return self.root / "report.html"

    @property
    def report_markdown(self) -> Path:
        return self.root / "report.md"

    @property
    def results_json(self) -> Path:
        return self.root / "results.json"

    def harness(self, variant: str) -> Path:
        """Rows of standard benchmarks of one variant."""
        return self.root / "eval" / f"{variant}.harness.json"

    def samples(self, variant: str) -> Path:
        """Finished rows of one variant, a line each, while it is measured and afterwards."""
        return self.root / "eval" / f"{variant}.samples.jsonl"

    def evaluation(self, variant: str) -> Path:
        return self.root / "eval" / f"{variant}.json"

    def require_unused(self) -> None:
        """Raise `RunFolderError` if a training run already left something here that can be used."""
        started = next(self.checkpoints.glob(f"*/{MANIFEST}"), None)
        for path in (self.adapter, self.merged, started and self.checkpoints):
            if path and path.exists():
                raise RunFolderError(
                    f"run_dir {self.root} already holds {path.name}/: use `longlora resume`, another run_dir, "
                    "or remove the folder"
                )


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the whole new one, also after a crash.

    Text is written as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content.encode("utf-8") if isinstance(content, str) else content)
            handle.flush()
            os.fsync(handle.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync([path.parent])


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of `value` as indented JSON; NaN is refused because no other reader takes it."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str) -> Any:
    """Parsed JSON of `path`; `RunFolderError` naming `remedy` when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(f"{path} does not exist: {remedy}") from None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read ({error}): {remedy}") from None


@contextlib.contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `path` only when the block ends without an error.

    Raises:
        RunFolderError: `path` exists and `replace` is false.
    """
    if path.exists() and not replace:
        raise RunFolderError(f"output folder {path} already exists: name another one or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        _sync(file for file in temporary.rglob("*") if file.is_file())
        if replace and path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync([path.parent])


def write_manifest(folder: Path, **facts: Any) -> None:
    """Write ``manifest.json`` last: names, sizes and sha256 of every file in `folder`, plus `facts`."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    _sync(folder / name for name in files)
    write_json(folder / MANIFEST, {**facts, "files": files})


def verify_manifest(folder: Path, remedy: str) -> dict[str, Any]:
    """The manifest of `folder` after checking that every file it names is whole.

    Raises:
        RunFolderError: the manifest or a file is missing, or a size or sha256 differs; the message ends with `remedy`.
    """
    manifest = read_json(folder / MANIFEST, remedy)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not files:
        raise RunFolderError(f"{folder / MANIFEST} names no files: {remedy}")
    for name, expected in files.items():
        _verify_file(folder / name, expected if isinstance(expected, dict) else {}, remedy)
    return dict(manifest)


def _verify_file(path: Path, expected: dict[str, Any], remedy: str) -> None:
    if not path.is_file():
        raise RunFolderError(f"{path} is missing: {remedy}")
    size = path.stat().st_size
    if size != expected.get("bytes"):
        raise RunFolderError(f"{path} has {size} bytes, its manifest says {expected.get('bytes')}: {remedy}")
    if sha256_file(path) != expected.get("sha256"):
        raise RunFolderError(f"{path} does not match its sha256: {remedy}")


def _sync(paths: Iterable[Path]) -> None:
    """Bring files or folders to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

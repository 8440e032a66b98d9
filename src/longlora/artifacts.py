"""The run folder: the only file that names what is written. How it is written safely is `storage.py`'s business.

A run folder holds, in the order in which a run makes it::

    recipe.yaml                      the resolved recipe
    data/train/  data/heldout/       token shards (tokens.bin, offsets.bin, mask.bin of instructions, manifest.json)
    metrics.jsonl                    one row per logged step
    checkpoints/checkpoint-N/        trainer state; one that is being written lies in checkpoints/.saving/
    adapter/                         LoRA + embeddings + norms, and longlora.json (RoPE, S2-Attn, base model)
    merged/                          an ordinary Hugging Face model; after full fine-tuning training writes it itself,
                                     with longlora.json and manifest.json, and there is no adapter/
    eval/VARIANT.json                rows measured for base, rope_only and trained
    eval/VARIANT.samples.jsonl       the same, a line each as soon as it is measured
    eval/VARIANT.harness.json        rows of standard benchmarks
    report.html  report.md  results.json
"""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from longlora.errors import RunFolderError
from longlora.storage import exclusive, new_folder, sync, write_atomic

MANIFEST = "manifest.json"
SIDECAR = "longlora.json"
TOKENS = "tokens.bin"
OFFSETS = "offsets.bin"
LOSS_MASK = "mask.bin"

__all__ = [
    "LOSS_MASK",
    "MANIFEST",
    "OFFSETS",
    "SIDECAR",
    "TOKENS",
    "RunFolder",
    "has_manifest_sizes",
    "lock_output",
    "new_folder",
    "read_json",
    "sha256_file",
    "verify_manifest",
    "write_atomic",
    "write_json",
    "write_manifest",
]


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
    def preparing(self) -> Path:
        """Where `longlora prepare` writes both shards before they take the place of earlier ones."""
        return self.root / "data" / ".preparing"

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

    def lock(self, what: str) -> AbstractContextManager[None]:
        """Keep other processes from writing into the run while `what` does; see `storage.exclusive`.

        Raises:
            RunFolderError: another process does; the message names it.
        """
        return exclusive(self.root / ".lock", f"run folder {self.root}", what)

    def lock_evaluation(self, variant: str, what: str) -> AbstractContextManager[None]:
        """The same for the rows of one variant: others may be measured at the same time."""
        path = self.evaluation(variant)
        return exclusive(path.with_name(f".{path.name}.lock"), f"{path}", what)

    def require_unused(self) -> None:
        """Raise `RunFolderError` if a training run already left something here that can be used."""
        started = next(self.checkpoints.glob(f"*/{MANIFEST}"), None)
        for path in (self.adapter, self.merged, started and self.checkpoints):
            if path and path.exists():
                raise RunFolderError(
                    f"run_dir {self.root} already holds {path.name}/: use `longlora resume`, another run_dir, "
                    "or remove the folder"
                )


def lock_output(folder: Path, what: str) -> AbstractContextManager[None]:
    """Keep other processes from making `folder` while `what` does.

    Raises:
        RunFolderError: it exists already, or another process makes it.
    """
    if folder.exists():
        raise RunFolderError(f"output folder {folder} already exists: name another one or remove it")
    return exclusive(folder.with_name(f".{folder.name}.lock"), f"output folder {folder}", what)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of `value` as indented JSON; NaN is refused because no other reader takes it."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str) -> Any:
    """Parsed JSON of `path`; `RunFolderError` naming `remedy` when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(f"{path} does not exist: {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} cannot be read ({error}): {remedy}") from None


def write_manifest(folder: Path, **facts: Any) -> None:
    """Write ``manifest.json`` last: names, sizes and sha256 of every file in `folder`, plus `facts`.

    The files, and the folders inside that name them, are on the disk before it is.
    """
    found = sorted(folder.rglob("*"))
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in found
        if path.is_file() and path.name != MANIFEST
    }
    sync(folder / name for name in files)
    sync(path for path in found if path.is_dir())
    write_json(folder / MANIFEST, {**facts, "files": files})


def has_manifest_sizes(folder: Path) -> bool:
    """Whether `folder` has a manifest and all files it names, in their sizes; what is in them is not read."""
    try:
        files = read_json(folder / MANIFEST, "")["files"]
        return bool(files) and all(
            (folder / name).stat().st_size == expected["bytes"] for name, expected in files.items()
        )
    except (RunFolderError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def verify_manifest(folder: Path, remedy: str) -> dict[str, Any]:
    """The manifest of `folder` after checking that every file it names lies in it and is whole.

    Raises:
        RunFolderError: the manifest or a file is missing, a size or sha256 differs, or a name leads out of `folder`;
            the message ends with `remedy`.
    """
    manifest = read_json(folder / MANIFEST, remedy)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not files:
        raise RunFolderError(f"{folder / MANIFEST} names no files: {remedy}")
    for name, expected in files.items():
        _verify_file(_inside(folder, name, remedy), expected if isinstance(expected, dict) else {}, remedy)
    return dict(manifest)


def _inside(folder: Path, name: str, remedy: str) -> Path:
    """The file that a manifest calls `name`, which must lie in `folder`, also where links lead."""
    plain = PurePosixPath(name)
    within = str(plain) == name and not plain.is_absolute() and ".." not in plain.parts and "\0" not in name
    try:
        within = within and (folder / name).resolve().is_relative_to(folder.resolve())
        (folder / name).exists()  # raises for a name that is too long
    except (OSError, RuntimeError, ValueError):  # too long a name, a link to itself, half a surrogate pair
        within = False
    if not within:
        raise RunFolderError(f"{folder / MANIFEST} names {name!r}, which is no file in its folder: {remedy}")
    return folder / name


def _verify_file(path: Path, expected: dict[str, Any], remedy: str) -> None:
    if not path.is_file():
        raise RunFolderError(f"{path} is missing: {remedy}")
    size, wanted = path.stat().st_size, expected.get("bytes")
    if type(wanted) is not int or size != wanted:
        raise RunFolderError(f"{path} has {size} bytes, its manifest says {wanted!r:.40}: {remedy}")
    try:
        found = sha256_file(path)
    except OSError as error:  # a bad sector, or no right to read it
        raise RunFolderError(f"{path} cannot be read ({error.strerror or error}): {remedy}") from error
    if found != expected.get("sha256"):
        raise RunFolderError(f"{path} does not match its sha256: {remedy}")

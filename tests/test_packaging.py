"""What an sdist holds, and a wheel made from it: everything that an installed longlora reads, and nothing stray."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest

builders = pytest.importorskip("hatchling.builders.sdist", reason="hatchling builds the package: pip install hatchling")

ROOT = Path(__file__).parent.parent
RECIPES = {path.name for path in (ROOT / "src" / "longlora" / "recipes").glob("*.yaml")}
AT_THE_TOP = {
    ".ci", ".gitignore", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "PKG-INFO",
    "README.md", "benchmarks", "constraints.txt", "docs", "examples", "pyproject.toml", "recipes", "src", "tests",
}  # fmt: skip


def sdist(folder: Path) -> Path:
    (made,) = builders.SdistBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return Path(made)


def inside(name: str) -> str:
    """The path of an sdist's member below its one folder."""
    return name.partition("/")[2]


def test_an_sdist_holds_what_the_tree_has_and_nothing_stray(tmp_path: Path) -> None:
    with tarfile.open(sdist(tmp_path)) as archive:
        names = [inside(member.name) for member in archive.getmembers()]
    assert {name.partition("/")[0] for name in names} <= AT_THE_TOP
    assert {"README.md", "LICENSE", "CITATION.cff", "pyproject.toml", "tests/conftest.py"} <= set(names)
    assert len(names) == len(set(names))
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".safetensors", ".bin"))]


def test_a_wheel_made_from_the_sdist_holds_the_recipes(tmp_path: Path) -> None:
    """The link recipes/ at the top once made hatchling pass over the folder it points to."""
    from hatchling.builders.wheel import WheelBuilder

    with tarfile.open(sdist(tmp_path)) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (tree,) = (tmp_path / "unpacked").iterdir()
    (made,) = WheelBuilder(str(tree)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(made) as archive:
        names = archive.namelist()
    assert {Path(name).name for name in names if name.startswith("longlora/recipes/")} == RECIPES
    assert "longlora/cli/app.py" in names
    assert not [name for name in names if name.startswith("tests")]

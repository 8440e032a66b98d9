"""Rules of the code base that a reader relies on: imports point one way, importing does no work, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "longlora"
# From the top of the stack to its bottom; a module imports from its own layer and those below.
LAYERS = [
    {"cli"},
    {"quickstart", "bench"},
    {"training", "evaluation", "planning", "inference"},
    {"model", "data"},
    {"memory", "attention"},
    {"config", "artifacts"},
    {"storage"},
    {"errors", "hints", "duration"},
]
FORBIDDEN = [
    ("data", "model"),
    ("evaluation", "training"),
    ("training", "evaluation"),
    ("planning", "training"),
    ("inference", "evaluation"),
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(SOURCE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("longlora."):
            found.add(str(node.module).split(".")[1])
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    relative = path.relative_to(SOURCE)
    if relative in (Path("__init__.py"), Path("__main__.py")):
        return
    own = relative.parts[0].removesuffix(".py")
    for other in imports(path):
        assert LEVEL[other] >= LEVEL[own], f"{own} imports {other}"
        assert (own, other) not in FORBIDDEN


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 75, node.name


@pytest.mark.parametrize("module", ["longlora", "longlora.config", "longlora.artifacts", "longlora.cli.app"])
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_output_files_are_named_in_artifacts_only() -> None:
    names = ("tokens.bin", "offsets.bin", "manifest.json", "longlora.json", "metrics.jsonl", "report.html")
    for path in MODULES:
        if path.name == "artifacts.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Constant) and node.value in names), f"{path}: {node.value}"

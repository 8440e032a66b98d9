"""The notebook is well formed and compiles; a slow test runs it from top to bottom on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from inference_cases import save_askable

NOTEBOOK = Path(__file__).parent.parent / "examples" / "longlora_colab.ipynb"
WINDOW = 512
# In place of what the parameters cell says: a tiny model, short texts, few questions.
SETTINGS = [
    "model.dtype=float32",
    "attention.group_size=128",
    "data.min_document_tokens=1",
    "train.steps=2",
    "train.save_steps=1",
    "eval.passkey.haystack=filler",
    "eval.passkey.lengths=[900]",
    "eval.passkey.depths=[0.5]",
    "eval.prefill_chunk_tokens=512",
]


def notebook() -> dict[str, Any]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def code_cells() -> list[tuple[str, str]]:
    return [(cell["id"], source(cell)) for cell in notebook()["cells"] if cell["cell_type"] == "code"]


def parameters() -> str:
    (cell,) = [cell for cell in notebook()["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    return cell["id"]


def test_it_is_a_notebook_of_format_4_without_anybodys_outputs() -> None:
    """The keys that the format's schema (nbformat 4.5) requires, and no others in a cell."""
    made = notebook()
    assert (made["nbformat"], made["nbformat_minor"]) == (4, 5)
    assert set(made) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in made["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in made["cells"]:
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert all(isinstance(line, str) for line in cell["source"])
        if cell["cell_type"] == "code":
            assert set(cell) == {"cell_type", "id", "metadata", "source", "execution_count", "outputs"}
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
        else:
            assert set(cell) == {"cell_type", "id", "metadata", "source"}
            assert cell["cell_type"] == "markdown"


def test_all_code_compiles_and_every_step_is_explained() -> None:
    for name, text in code_cells():
        compile(text, name, "exec")
    kinds = [cell["cell_type"] for cell in notebook()["cells"]]
    assert kinds[0] == "markdown"
    assert kinds.count("markdown") >= kinds.count("code") - 1


def test_parameters_stand_before_all_other_code() -> None:
    name, text = code_cells()[0]
    assert name == parameters()
    values: dict[str, Any] = {}
    exec(text, values)
    assert {"SOURCE", "RUN_DIR", "MODEL", "MINE", "QUESTION", "OVERRIDES"} <= set(values)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A tiny model and texts of one's own, one file of which holds none; all cells in one namespace, as in Jupyter."""
    model = save_askable(tmp_path / "model", WINDOW)
    mine = tmp_path / "mine"
    mine.mkdir()
    for number in range(3):
        (mine / f"{number}.txt").write_text(f"There were {number} bears in the wood. " * 60, encoding="utf-8")
    (mine / "empty.pdf").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    space: dict[str, Any] = {}
    for name, text in code_cells():
        exec(compile(text, name, "exec"), space)
        if name == parameters():
            space |= {"MODEL": str(model), "MINE": str(mine), "OVERRIDES": SETTINGS}
    said = capfd.readouterr().out
    assert "left out: " in said
    assert "held out: 002_2.txt" in said
    run = tmp_path / "runs" / "colab"
    assert (run / "merged" / "model.safetensors").is_file()
    assert {path.name for path in run.glob("report.*")} >= {"report.html", "report.md"}
    assert (tmp_path / "runs" / "colab_model" / "README.md").is_file()
    config = json.loads((tmp_path / "runs" / "colab_model" / "config.json").read_text(encoding="utf-8"))
    assert config["max_position_embeddings"] == 2 * WINDOW
    verbs = re.findall(r"^\$ longlora (\S+)", said, flags=re.MULTILINE)
    assert verbs == ["--help", "plan", "prepare", "train", "merge", "eval", "report", "ask", "export"]

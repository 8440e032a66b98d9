"""What a run hands over tells nobody the home folder, the places of private data, or a secret of the environment."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Result
from tiny import save_tiny_model

PLACE, TOKEN = "marker-7f3a-private", "hf_marker_c0ffee_token"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a private place in it where everything is, and secrets in the environment."""
    home = tmp_path / "home-of-somebody"
    place = home / PLACE
    (place / "texts").mkdir(parents=True)
    for number in range(3):
        text = f"the {number} bears went over the mountain and saw another mountain. " * 10
        (place / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    save_tiny_model(place / "base")
    (place / "recipe.yaml").write_text(
        f"""
run_dir: {place / "run"}
model: {{name_or_path: {place / "base"}, dtype: float32}}
context: {{context_length: 256}}
attention: {{group_size: 64, sink_tokens: 2}}
data: {{train: [{place / "texts"}], heldout: [{place / "texts"}]}}
train: {{steps: 1, grad_accum_steps: 1, warmup_steps: 0}}
eval: {{tasks: [perplexity], perplexity: {{max_documents: 1}}}}
""",
        encoding="utf-8",
    )
    monkeypatch.setenv("HOME", str(home))
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, TOKEN)
    return home


def holding(folder: Path, word: str) -> list[str]:
    """Files under `folder`, or that file, in which `word` stands in their bytes or their names."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()] if folder.is_dir() else [folder]
    assert files, f"{folder} is empty"
    # In JSON and UTF-16 as well.
    forms = {word.encode(), json.dumps(word)[1:-1].encode(), word.encode("utf-16-le")}
    return [str(path) for path in files if word in path.name or any(form in path.read_bytes() for form in forms)]


def test_nothing_that_a_run_hands_over_names_private_places(longlora: Callable[..., Result], home: Path) -> None:
    place = home / PLACE
    run = place / "run"
    for words in (
        ["prepare", str(place / "recipe.yaml")],
        ["train", str(place / "recipe.yaml")],
        ["merge", str(run)],
        ["eval", str(run)],
        ["report", str(run)],
        ["export", str(run), "--output", str(place / "given")],
    ):
        done = longlora(*words)
        assert done.returncode == 0, (words, done.stderr)
    handed_over = [run / name for name in ("adapter", "merged", "report.html", "report.md", "results.json")]
    for each in [*handed_over, place / "given"]:
        assert not holding(each, str(home)), f"{home} stands in {each.name}"
        assert not holding(each, home.name)
    for each in (run / "merged", place / "given"):  # without the sidecar, which names the base model
        assert not holding(each, PLACE), f"{PLACE} stands in {each.name}"
    assert not holding(place, TOKEN), "a secret of the environment was written"
    named = json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == f"~/{PLACE}/base"
    assert str(place / "texts") in (run / "recipe.yaml").read_text()  # the user's own, which must work again
    assert holding(run / "recipe.yaml", os.environ["HOME"])  # and the search finds what is there

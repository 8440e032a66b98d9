"""The quickstart's stages on a tiny model; the real model and texts in a slow test."""

import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from longlora.cli.app import main
from longlora.quickstart import run


def test_all_stages_on_a_local_model(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train", "heldout"):
        Path(f"{name}.txt").write_text(
            f"a {name} story about bears that never comes to an end. " * 40, encoding="utf-8"
        )
    arguments = ["longlora", "quickstart", "--model", str(tiny_model_folder), "--run-dir", "out"]
    arguments += [
        "context.context_length=1024",
        "data.min_document_tokens=0",
        "attention.group_size=32",
    ]
    arguments += ["data.train=[train.txt]", "data.heldout=[heldout.txt]", "train.steps=2", "train.learning_rate=0.02"]
    arguments += ["eval.passkey.lengths=[900,1024]", "model.dtype=float32"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capfd.readouterr()
    assert not stopped.value.code, printed.err
    assert "report: out/report.html" in printed.out
    assert "total time" in printed.out
    assert "RoPE only" in printed.out
    for name in ("report.html", "report.md", "merged/config.json", "adapter/longlora.json", "recipe.yaml"):
        assert (tmp_path / "out" / name).is_file()
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "already holds adapter/" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("products", "override", "dtype"),
    [(True, [], "bfloat16"), (False, [], "float32"), (False, ["model.dtype=bfloat16"], "bfloat16")],
)
def test_a_cpu_without_products_in_bfloat16_computes_in_float32_and_says_so(
    tmp_path: Path,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    products: bool,
    override: list[str],
    dtype: str,
) -> None:
    monkeypatch.setattr(run, "has_bfloat16_products", lambda: products)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    said = StringIO()
    texts = ["data.train=[train.txt]", "data.heldout=[heldout.txt]"]
    recipe = run.quickstart_recipe(tmp_path, str(tiny_model_folder), [*texts, *override], Console(file=said))
    assert recipe.model.dtype == dtype
    assert said.getvalue().startswith("model.dtype=float32") == (dtype == "float32")


@pytest.mark.slow
def test_the_real_model_and_texts_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longlora.config import ModelConfig
    from longlora.model.build import load_model, load_tokenizer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = run.quickstart_recipe(tmp_path / "run", None, [], Console(quiet=True))
    model = load_model(recipe.model)
    tokenizer = load_tokenizer(ModelConfig(name_or_path=recipe.model.name_or_path))
    assert model.config.max_position_embeddings == 8192
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    # SmolLM2 splits numbers into digits; a GGUF file does not say so, its merges have to.
    assert len(tokenizer("1234", add_special_tokens=False).input_ids) == 4
    said = model.generate(
        **tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=3, do_sample=False
    )
    assert "Paris" in tokenizer.decode(said[0])
    assert {Path(path).stem for path in recipe.data.heldout} == set(run.HELDOUT)
    assert len(recipe.data.train) > 200

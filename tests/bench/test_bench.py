"""Steps measured in processes of their own, through ``longlora bench`` and as the benchmarks call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import llama_config

from longlora.bench.inputs import random_model
from longlora.bench.step import StepCost, StepJob, measure_apart, recipe_of


@pytest.fixture
def config_folder(tmp_path: Path) -> Path:
    """A model folder with a config and nothing else, whose RoPE is scaled already."""
    folder = tmp_path / "config"
    folder.mkdir()
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    config = llama_config(vocab_size=300, num_hidden_layers=2, rope_parameters=rope, max_position_embeddings=256)
    (folder / "config.json").write_text(config.to_json_string(), encoding="utf-8")
    return folder


def test_bench_prints_ours_beside_full_attention(config_folder: Path, longlora: Any) -> None:
    code, out, _ = longlora(
        "bench", str(config_folder), "attention.group_size=32", "train.logging_steps=10", "--context", "128",
        "--steps", "2", "--layers", "1",
    )  # fmt: skip
    assert code == 0
    lines = [line for line in out.splitlines() if "GB" in line]
    assert [line.strip().split("  ")[0] for line in lines] == [
        "Trainer and PEFT LoRA, full attention", "longlora, full attention", "longlora, S2-Attn",
    ]  # fmt: skip
    assert "1.00 x" in lines[0]
    assert "128 tokens" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "1"], "--steps 1: must be at least 2"),
        (["--context", "8"], "--context 8: must be at least 64"),
        (["--layers", "3"], "--layers 3: the model has 2, give 1 to 2"),
        (["train.setps=3"], "did you mean train.steps"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, config_folder: Path, longlora: Any) -> None:
    code, out, err = longlora("bench", str(config_folder), *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_the_roll_is_measured_too_and_a_failure_is_a_line(tmp_path: Path) -> None:
    random_model(llama_config(vocab_size=300), 128, tmp_path / "model")
    job = StepJob("roll", str(tmp_path / "model"), str(tmp_path / "run"), 128, steps=2, group_size=32)
    cost = measure_apart(job)
    assert isinstance(cost, StepCost)
    assert cost.seconds > 0
    assert cost.peak_bytes > 10**8
    odd = StepJob("roll", str(tmp_path / "model"), str(tmp_path / "other"), 100, steps=2, group_size=32)
    assert "100 tokens are not a multiple of group_size=32" in str(measure_apart(odd))


def test_steps_are_alike_and_logged_whatever_the_recipe_says() -> None:
    values = {
        "train": {"logging_steps": 10, "micro_batch_size": 4, "grad_accum_steps": 2},
        "attention": {"full_attention_final_fraction": 0.5, "group_size": 64},
        "adapter": {"embedding_rows": "occurring"},
    }
    job = StepJob("longlora", "model", "run", 512, steps=3, values=values)
    made = recipe_of(StepJob(**json.loads(json.dumps(vars(job)))))
    assert made.train.logging_steps == made.train.micro_batch_size == made.train.grad_accum_steps == 1
    assert made.attention.full_attention_final_fraction == 0
    assert made.attention.group_size == 64
    assert made.adapter.embedding_rows == "all"
    assert made.model.original_context_length == 256

"""The whole plan, the longest context, and the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from planning_cases import PAPER, llama_2_7b, recipe, small
from tiny import llama_config

from longlora.config import dump_recipe
from longlora.errors import PlanError, UnsupportedModelError
from longlora.planning import calibrate as calibration
from longlora.planning.calibrate import calibrate
from longlora.planning.flops import step_flops
from longlora.planning.longest import longest_context, with_settings
from longlora.planning.machines import gpu, this_machine, with_memory
from longlora.planning.memory import peak_memory
from longlora.planning.outline import outline
from longlora.planning.plan import Plan, plan_run, require_fits, run_disk, step_time

# Hours of 1000 steps of 64 sequences on 8 A100 (paper, table 12).
TABLE_12 = [(8192, 6.0, 5.2), (16384, 14.0, 11.3), (32768, 36.5, 24.6), (65536, 92.5, 52.4)]


@pytest.mark.parametrize(("tokens", "full", "sparse"), TABLE_12)
def test_hours_are_those_of_the_papers_table_12(tokens: int, full: float, sparse: float) -> None:
    for pattern, hours in (("full", full), ("s2", sparse)):
        settings = recipe(tokens, **PAPER, **{"attention.pattern": pattern})
        model = outline(llama_2_7b(), settings)
        seconds = step_time(step_flops(model, settings.train, tokens), model, gpu("a100-80g", 8)).total
        assert 1000 * seconds / 3600 == pytest.approx(hours, rel=0.1)


def test_a_plan_goes_to_json_and_back() -> None:
    made = plan_run(recipe(1024), small(), gpu("l4", 2), price_per_hour=0.5, fit=True)
    assert Plan.from_json(made.to_json()) == made
    sums = json.loads(made.to_json())["sums"]
    assert sums["memory_peak"] == made.memory.peak
    assert made.cost == pytest.approx(made.hours * 2 * 0.5)
    assert made.tokens_per_step == 2 * 8 * 1024
    assert (made.original_context_length, made.context_length) == (128, 1024)
    assert made.rope_after["factor"] == 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.hours = 0  # type: ignore[misc]


def test_layers_whose_window_is_the_old_context_are_refused_as_training_refuses_them() -> None:
    """Within the old context such a window hides nothing; in the new one it does."""
    config = small("mistral", sliding_window=128)
    assert config.max_position_embeddings == 128
    with pytest.raises(UnsupportedModelError, match="all layers of model type 'mistral' have a window"):
        plan_run(recipe(1024), config, gpu("l4"))


@pytest.mark.parametrize(("ratio", "sinks"), [(1 / 64, 64), (0.001, 4)])
def test_groups_that_are_a_small_part_of_a_long_context_are_planned(ratio: float, sinks: int) -> None:
    """Rehearsed at some thousand tokens, of which that part has no room for the sink tokens."""
    changes = {"attention.group_size": None, "attention.group_size_ratio": ratio, "attention.sink_tokens": sinks}
    settings = recipe(131072, **changes)
    peak = peak_memory(small(), settings, outline(small(), settings), gpu("l4")).peak
    fixed = recipe(
        131072,
        **{"attention.group_size": settings.attention.resolve_group_size(131072), "attention.sink_tokens": sinks},
    )
    assert peak == pytest.approx(peak_memory(small(), fixed, outline(small(), fixed), gpu("l4")).peak, rel=0.1)


def test_the_final_phase_with_full_attention_costs_more() -> None:
    def hours(**settings: Any) -> float:
        changes = {f"attention.{key}": value for key, value in settings.items()}
        return plan_run(recipe(2048, **changes, **{"train.steps": 100}), small(), gpu("l4")).hours

    tenth, all_steps = (hours(full_attention_final_fraction=fraction) for fraction in (0.1, 1))
    assert hours() < tenth < all_steps
    assert all_steps == pytest.approx(hours(pattern="full"))


def test_text_files_that_reach_the_context_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("long.txt", 5000), ("short.md", 100), ("other.csv", 9000), (".hidden.txt", 9000)):
        (tmp_path / name).write_text("x" * size, encoding="utf-8")
    made = plan_run(recipe(1024, **{"data.train": [str(tmp_path)]}), small(), gpu("l4"))
    assert made.documents is not None
    assert (made.documents.documents, made.documents.reaching, made.documents.counted) == (2, 1, False)
    (tmp_path / "home" / "books").mkdir(parents=True)
    (tmp_path / "home" / "books" / "A.TXT").write_text("x" * 5000, encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    at_home = plan_run(recipe(1024, **{"data.train": ["~/books"]}), small(), gpu("l4")).documents
    assert at_home is not None
    assert at_home.reaching == 1
    assert plan_run(recipe(1024), small(), gpu("l4")).documents is None


def test_the_longest_context_fits_and_a_longer_one_does_not() -> None:
    config, settings = small(), recipe(4096)
    machine = with_memory(this_machine(), 1.0)
    found = longest_context(settings, config, machine).as_it_is

    def peak(context: int) -> int:
        there = with_settings(settings, {"context.context_length": context})
        return peak_memory(config, there, outline(config, there), machine).peak

    assert peak(found) <= machine.memory_bytes < peak(round(1.03 * found) + 1024)


def test_a_context_that_does_not_fit_names_the_largest_and_the_lever() -> None:
    config = small(num_hidden_layers=4)
    kept = recipe(65536, **{"train.activation_checkpointing": False})
    needed = peak_memory(config, kept, outline(config, kept), this_machine()).peak
    plan = plan_run(kept, config, with_memory(this_machine(), 0.8 * needed / 1e9))
    assert not plan.fits
    assert plan.fit is not None
    assert plan.fit.levers
    assert plan.fit.with_levers >= 65536 > plan.fit.as_it_is > 0
    with pytest.raises(PlanError, match=r"65536 needs .* GB .*: set train\..* with which \d+ tokens fit") as caught:
        require_fits(plan)
    assert "\n" not in str(caught.value)
    with pytest.raises(PlanError, match="not even the shortest context fits"):
        require_fits(plan_run(kept, config, with_memory(this_machine(), 0.1)))
    require_fits(plan_run(recipe(1024), config, gpu("h200")))


@pytest.mark.parametrize(("kind", "sizes"), [("llama", {}), ("gemma3_text", {"sliding_window": 64})])
def test_calibration_measures_positive_rates(kind: str, sizes: dict[str, Any]) -> None:
    config = small(kind, num_hidden_layers=6, **sizes)
    made = calibrate(config, recipe(512, **{"attention.group_size": 128}), this_machine())
    assert min(made.linear_flops, made.score_flops, made.head_flops, made.bandwidth) > 0
    assert "measured" in made.basis


@pytest.fixture
def on_disk(tmp_path: Path) -> str:
    """A recipe whose model folder holds a config and nothing else."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(llama_config().to_json_string(), encoding="utf-8")
    changes = {"run_dir": str(tmp_path / "run")}
    settings = recipe(1024, **{"model.name_or_path": str(tmp_path / "model")}).model_copy(update=changes)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(settings), encoding="utf-8")
    return str(tmp_path / "recipe.yaml")


def test_command_line(on_disk: str, longlora: Any) -> None:
    code, out, _ = longlora("plan", on_disk, "--gpu", "a100-80g", "--gpus", "8", "--price", "2")
    assert code == 0
    for said in (
        "8 x a100-80g",
        "64 -> 1,024 tokens",
        "yarn",
        "saved activations",
        "optimizer",
        "cost",
        "merged model",
    ):
        assert said in out
    code, out, _ = longlora("plan", on_disk, "--gpu", "l4", "--json", "train.steps=7")
    assert code == 0
    assert Plan.from_json(out).steps == 7


def test_command_line_for_a_mesh(on_disk: str, longlora: Any) -> None:
    mesh = ["--gpu", "a100-80g", "--gpus", "16", "parallel.sequence=4", "parallel.shard=fsdp2"]
    code, out, _ = longlora("plan", on_disk, *mesh)
    assert code == 0
    for said in (
        "4 x 4, on 2 nodes of 8",
        "weights, gradients and optimizer states (fsdp2)",
        "gathered",
        "halo, beside computing",
        "waiting for messages",
        "main memory of a node while weights are read",
    ):
        assert said in out
    code, out, _ = longlora("plan", on_disk, *mesh, "--json", "attention.pattern=full")
    made = Plan.from_json(out)
    assert (code, made.mesh.data, made.mesh.sequence, made.devices) == (0, 4, 4, 16)
    assert [each.name for each in made.messages] == ["gradients", "weights, gathered", "all-to-all"]
    _, out, _ = longlora("plan", on_disk, "--gpu", "a100-80g")
    assert "data x sequence" not in out
    assert "messages" not in out


def test_command_line_measures_this_machine(on_disk: str, longlora: Any) -> None:
    code, out, err = longlora("plan", on_disk, "--json")
    assert code == 0
    assert "measuring this machine" in err
    assert "measured" in Plan.from_json(out).rates


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "abacus"], "--gpu abacus is unknown: give one of a10g, "),
        (["--gpus", "2"], "--gpus 2 needs --gpu"),
        (["--gpu", "l4", "--gpus", "0"], "must be at least 1"),
        (["--gpu", "l4", "--memory", "0"], "must be more than 0 GB"),
        # Looks for the settings that would fit; that this is said is in test_a_context_that_does_not_fit as well.
        pytest.param(
            ["--gpu", "l4", "--memory", "0.65", "context.context_length=65536"], "needs", marks=pytest.mark.slow
        ),
        (["--gpu", "l4", "context.context_length=32"], "is not longer than"),
        (["--gpu", "l4", "--gpus", "8", "parallel.sequence=3"], "parallel.sequence=3 does not divide the 8 devices"),
        (["--gpu", "l4", "--gpus", "8", "parallel.sequence=8"], "shorter than group_size=256"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, on_disk: str, longlora: Any) -> None:
    code, _, err = longlora("plan", on_disk, *arguments)
    assert code == 2
    assert said in err
    assert err.startswith("longlora: ")
    assert err.count("\n") == 1


def test_fit_prints_the_longest_and_does_not_fail(on_disk: str, longlora: Any) -> None:
    arguments = ["--gpu", "l4", "--memory", "0.65", "--fit", "context.context_length=65536"]
    code, out, _ = longlora("plan", on_disk, *arguments)
    assert code == 0
    assert "longest context that fits" in out


def test_a_checkpoint_is_as_large_as_the_states_of_its_optimizer() -> None:
    config = small(num_hidden_layers=2)
    whole, small_states = (
        run_disk(recipe(1024, **{"train.optimizer": optimizer}), config).checkpoints
        for optimizer in ("adamw", "adamw_8bit")
    )
    assert 0.3 * whole < small_states < whole


def test_layers_of_full_attention_can_be_timed() -> None:
    """The probe has one layer, which need not be one of those that the recipe names."""
    config = small(num_hidden_layers=4)
    tokens = [
        calibration._tokens(config, recipe(4096, **{"attention.full_attention_layers": full})) for full in ([], [3])
    ]
    assert tokens[0] == tokens[1] > 0

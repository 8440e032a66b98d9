"""What several processes agree on and say, without starting any: launchers' settings, batches, errors."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from longlora.config import Recipe, build_recipe
from longlora.errors import InterruptedRunError, LongLoraError, ModelError, RunFolderError
from longlora.training import failures
from longlora.training.collectives import from_main, gathered, largest, require_same
from longlora.training.distributed import Ranks
from longlora.training.failures import is_lost_contact, report
from longlora.training.launchers import with_launcher_settings
from longlora.training.saved import Batches


def recipe(**changes: object) -> Recipe:
    values = {"run_dir": "run", "model": {"name_or_path": "m"}, "context": {"context_length": 128}}
    return build_recipe(values, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true", "OTHER": "kept"}

DEEPSPEED = {
    "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_MIXED_PRECISION": "bf16", "OTHER": "kept",
}  # fmt: skip


def test_accelerates_deepspeed_is_followed_and_said(tmp_path: Path) -> None:
    environment = dict(DEEPSPEED)
    followed, lines = with_launcher_settings(recipe(), environment)
    assert followed.parallel.shard == "zero3"
    assert lines == ["parallel.shard=zero3, as accelerate launch asks"]
    assert environment == {"OTHER": "kept"}
    assert with_launcher_settings(recipe(parallel__shard="zero3"), dict(DEEPSPEED))[1] == []
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}')
    followed, lines = with_launcher_settings(recipe(), DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
    assert followed.parallel.shard == "zero2"
    assert lines[0] == f"of {file} the stage of ZeRO is used, the rest follows from the recipe"
    file.write_text('{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}')
    with pytest.raises(LongLoraError, match="offload_param to cpu"):
        with_launcher_settings(recipe(), DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
    with pytest.raises(LongLoraError, match="nowhere.json cannot be read .FileNotFoundError"):
        with_launcher_settings(recipe(), DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "nowhere.json"})


def test_accelerates_fsdp_is_followed_and_said() -> None:
    environment = dict(FSDP)
    followed, lines = with_launcher_settings(recipe(), environment)
    assert followed.parallel.shard == "fsdp2"
    assert lines == ["parallel.shard=fsdp2, as accelerate launch asks"]
    assert environment == {"OTHER": "kept"}, "the libraries must not act on it once more"
    assert with_launcher_settings(recipe(parallel__shard="fsdp2"), dict(FSDP))[1] == []
    plain = recipe()
    assert with_launcher_settings(plain, {"ACCELERATE_MIXED_PRECISION": "no"}) == (plain, [])


@pytest.mark.parametrize(
    ("changes", "environment", "message"),
    [
        ({}, FSDP | {"FSDP_VERSION": "1"}, "FSDP version 1: give --fsdp_version 2"),
        ({"parallel__shard": "zero3"}, FSDP, "the recipe for parallel.shard=zero3: leave one of them out"),
        ({}, DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "ZeRO stage 1: give --zero_stage 2 or 3"),
        ({"parallel__shard": "fsdp2"}, DEEPSPEED, "the recipe for parallel.shard=fsdp2: leave one of them out"),
        ({}, DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer to cpu"),
        ({}, FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS=true: weights stay"),
        ({}, FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "False"}, "FSDP_RESHARD_AFTER_FORWARD=false"),
        ({}, {"ACCELERATE_MIXED_PRECISION": "fp16"}, "--mixed_precision fp16, the recipe for model.dtype=bfloat16"),
        ({"model__dtype": "float32"}, {"ACCELERATE_MIXED_PRECISION": "bf16"}, "model.dtype=float32"),
        ({}, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--dynamo_backend INDUCTOR"),
        ({}, {"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
    ],
)
def test_what_contradicts_the_recipe_is_refused(
    changes: dict[str, str], environment: dict[str, str], message: str
) -> None:
    with pytest.raises(LongLoraError, match=message):
        with_launcher_settings(recipe(**changes), dict(environment))


def test_rows_of_a_step_on_another_number_of_processes() -> None:
    assert Batches(rows=2, steps=3, processes=4).on(6) == Batches(rows=2, steps=2, processes=6)
    with pytest.raises(RunFolderError, match="12 micro batches in a step .* 5 processes cannot share .* 1, 2, 3, 4, 6"):
        Batches(rows=2, steps=3, processes=4).on(5)


def test_one_process_agrees_with_itself() -> None:
    assert from_main(Ranks(), lambda: 7) == 7
    assert largest(Ranks(), -2.5) == -2.5
    assert gathered(Ranks(), "a") == ["a"]
    require_same(Ranks(), {"a": "b"})


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What processes print; they share a store, wait less, and are threads."""
    lines: list[str] = []
    store = dist.HashStore()
    monkeypatch.setattr(failures, "_store", lambda: store)
    monkeypatch.setattr(failures, "_say", lambda who, message: lines.append(who + message))
    monkeypatch.setattr(failures, "_TOGETHER", 0.5)
    monkeypatch.setattr(failures, "_FIRST_WORD", 1.0)
    return lines


def all_report(errors: list[BaseException], world: int) -> None:
    """Rank r ends with ``errors[r]``; ranks without one say nothing. The first rank begins a little later."""

    def run(rank: int) -> None:
        time.sleep(0.05 * (rank == 0))
        report(Ranks(rank, world), errors[rank], str(errors[rank]))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(errors))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


GONE = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:34567")


def test_an_error_of_all_is_said_once(said: list[str]) -> None:
    all_report([ModelError("a bad recipe")] * 3, 3)
    assert said == ["a bad recipe"]


def test_an_error_of_one_is_said_with_its_rank_and_before_the_others(said: list[str]) -> None:
    all_report([GONE, ModelError("no room here"), GONE], 3)
    assert said[0] == "rank 1: no room here"
    assert len(said) == 2
    assert "lost contact with the others" in said[1]


def test_a_process_that_is_gone_is_named(said: list[str]) -> None:
    all_report([GONE, GONE], 3)
    (line,) = said
    assert "lost contact with rank 2, which ended without a word (killed, or out of memory)" in line
    assert "`longlora resume` goes on" in line


def test_an_agreed_stop_is_said_by_the_first(said: list[str]) -> None:
    all_report([InterruptedRunError("interrupted", 143)] * 2, 2)
    assert said == ["interrupted"]


def test_which_errors_only_say_that_another_is_gone() -> None:
    assert is_lost_contact(GONE)
    assert is_lost_contact(dist.DistBackendError("NCCL"))
    assert not is_lost_contact(RuntimeError("shapes differ"))
    assert not is_lost_contact(ModelError("gloo"))

"""Running out of memory: recognised as what it is, and answered with the largest part and a lever that is left."""

from __future__ import annotations

import resource
import sys
from typing import Any

import pytest
import torch
from planning_cases import recipe, small

from longlora.memory.limit import limited_memory
from longlora.planning.levers import levers, with_settings
from longlora.planning.machines import this_machine
from longlora.planning.memory import peak_memory
from longlora.planning.out_of_memory import explain_out_of_memory, explained_out_of_memory, is_out_of_memory
from longlora.planning.outline import outline

CPU = torch.device("cpu")


def real_errors() -> list[BaseException]:
    errors: list[BaseException] = [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
    ]
    try:
        torch.empty(1 << 50)
    except RuntimeError as error:
        errors.append(error)
    return errors


def test_every_way_to_say_it_is_recognised() -> None:
    errors = real_errors()
    assert len(errors) == 3
    assert all(is_out_of_memory(error) for error in errors)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("settings", "sizes", "largest", "remedy"),
    [
        (
            {"train.activation_checkpointing": False},
            {"num_hidden_layers": 8},
            "saved activations",
            "resume with train.activation_checkpointing=true train.activation_checkpointing_every=4",
        ),
        ({}, {"intermediate_size": 1000}, "temporary", "resume with train.mlp_tile_tokens=2048"),
        (
            {"train.mlp_tile_tokens": 512, "train.loss_chunk_tokens": 8192},
            {"vocab_size": 4000},
            "temporary",
            "resume with train.loss_chunk_tokens=256",
        ),
        (
            {"train.mlp_tile_tokens": 256, "train.loss_chunk_tokens": 128},
            {"vocab_size": 200_000, "hidden_size": 256, "tie_word_embeddings": False},
            "optimizer",
            "train in another run_dir with adapter.embedding_rows=occurring",
        ),
    ],
)
def test_the_largest_part_and_its_lever_are_named(
    settings: dict[str, Any], sizes: dict[str, Any], largest: str, remedy: str
) -> None:
    config, chosen = small(**sizes), recipe(8192, **settings)
    memory = peak_memory(config, chosen, outline(config, chosen), this_machine())
    line = explain_out_of_memory(real_errors()[-1], chosen, memory, CPU, step=3, resumable=True)
    assert "\n" not in line
    assert line.startswith("out of memory on cpu in step 3 (")
    assert f"most of it {largest} (" in line
    assert remedy in line
    assert "checkpoints are intact" in line


def test_without_a_plan_the_cheapest_lever_is_named() -> None:
    chosen = recipe(**{"train.loss_chunk_tokens": 2048})
    line = explain_out_of_memory(MemoryError(), chosen, None, CPU, step=0, resumable=False)
    assert "planned" not in line
    assert "before the first step (MemoryError)" in line
    assert "train again with train.loss_chunk_tokens=256 (there is no checkpoint yet)" in line


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the limit")
def test_a_process_that_outgrows_its_memory_gets_an_error_instead_of_being_killed() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with limited_memory(200 * 2**20):
        small = torch.ones(2**20)
        with pytest.raises(RuntimeError) as caught:
            torch.ones(2**28)
        assert is_out_of_memory(caught.value)
    assert small.sum() == 2**20
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert torch.ones(2**26).sum() == 2**26


def test_an_error_of_another_kind_is_not_touched() -> None:
    with (
        pytest.raises(ValueError, match="something else"),
        explained_out_of_memory(recipe(), None, CPU, step=lambda: 1, resumable=lambda: False),
    ):
        raise ValueError("something else")


def test_what_is_pulled_already_is_not_proposed() -> None:
    pulled = recipe(**{"train.mlp_tile_tokens": 64, "adapter.train_embeddings": False})
    assert levers(pulled, cuda=False) == []
    line = explain_out_of_memory(MemoryError(), pulled, None, CPU, step=1, resumable=False)
    assert "no lever is left, lower context.context_length" in line
    assert [str(lever) for lever in levers(pulled, cuda=True)] == [
        "train.activation_offload=true", "train.optimizer=adamw_8bit", "model.quantization=nf4",
    ]  # fmt: skip


def test_every_lever_is_pulled_by_its_settings() -> None:
    bare = recipe(
        **{"train.activation_checkpointing": False, "train.loss_chunk_tokens": 1024, "model.dtype": "float32"}
    )
    every = with_settings(bare, {"train.micro_batch_size": 4, "train.grad_accum_steps": 2})
    found = levers(every, cuda=True)
    assert "train.micro_batch_size=1 train.grad_accum_steps=8" in [str(lever) for lever in found]
    while left := levers(every, cuda=True):
        every = with_settings(every, left[0].settings)
        assert len(levers(every, cuda=True)) < len(left)
    assert every.train.micro_batch_size * every.train.grad_accum_steps == 8

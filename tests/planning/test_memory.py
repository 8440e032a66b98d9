"""Memory: the rehearsal against real tensors, and every lever makes smaller what it should."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planning_cases import llama_2_7b, recipe, small
from transformers import AutoModelForCausalLM

from longlora.artifacts import RunFolder
from longlora.bench.inputs import random_shard
from longlora.config import Recipe
from longlora.data.shards import open_shard
from longlora.model.adapters import add_adapter, cast_to_compute_dtype
from longlora.model.attention import apply_attention
from longlora.model.levers import apply_memory_levers
from longlora.model.trainable import make_trainable
from longlora.planning import rehearsal
from longlora.planning.machines import Machine, gpu, this_machine
from longlora.planning.memory import Memory, fits, peak_memory
from longlora.planning.outline import outline
from longlora.planning.rehearsal import rehearse, with_layers


def memory(settings: Recipe, config: Any = None, machine: Machine | None = None) -> Memory:
    config = config or small(num_hidden_layers=3)
    return peak_memory(config, settings, outline(config, settings), machine or this_machine())


def test_parts_are_positive_and_sum_to_the_peak() -> None:
    made = memory(recipe())
    assert made.peak == sum(made.parts.values())
    assert min(made.parts.values()) >= 0
    assert made.parts[made.largest.replace(" ", "_")] == max(made.parts.values())


def test_weights_are_those_of_a_real_model() -> None:
    config, settings = small(num_hidden_layers=3, tie_word_embeddings=False), recipe()
    made = memory(settings, config)
    real = add_adapter(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), settings.adapter)
    sizes = {True: 0, False: 0}
    for name, parameter in real.named_parameters():
        # What training frees (memory/embeddings.py).
        if "embed_tokens.original_module" not in name:
            sizes[parameter.requires_grad] += parameter.numel() * parameter.element_size()
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in real.buffers())
    assert made.trained_weights == sizes[True]
    assert made.frozen_weights + made.frozen_copies == sizes[False] + buffers
    assert made.optimizer == 2 * sizes[True]


def test_full_fine_tuning_holds_float32_weights_gradients_and_moments_and_nothing_frozen() -> None:
    config, settings = small(num_hidden_layers=3), recipe(**{"adapter.method": "full", "train.grad_accum_steps": 2})
    count = AutoModelForCausalLM.from_config(config).num_parameters()
    made, lora = memory(settings, config), memory(recipe(), config)
    assert (made.trained_weights, made.gradients, made.optimizer) == (4 * count, 4 * count, 8 * count)
    assert made.frozen_copies == 0
    assert made.frozen_weights < 1000, "buffers of RoPE alone"
    assert made.peak > lora.peak
    small_states = memory(recipe(**{"adapter.method": "full", "train.optimizer": "adamw_8bit"}), config).optimizer
    in_32_bits = 64 * (512 + 7)  # tied embeddings, and seven norms
    assert small_states == 8 * in_32_bits + 2 * (count - in_32_bits)


@contextlib.contextmanager
def real_model(config: Any, settings: Recipe) -> Iterator[Any]:
    """What `rehearsal._fake_model` makes, with tensors that hold something."""
    model = make_trainable(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), settings.adapter)
    cast_to_compute_dtype(model, torch.bfloat16)
    apply_memory_levers(model, settings)
    apply_attention(model, settings.attention, settings.context.context_length)
    yield model.train()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train.activation_checkpointing": False},
        {"train.mlp_tile_tokens": 128, "train.micro_batch_size": 2},
        {"attention.pattern": "full", "train.grad_accum_steps": 2},
        {"adapter.method": "full"},
    ],
)
def test_the_rehearsal_counts_what_a_step_with_real_tensors_holds(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, settings = small(num_hidden_layers=3), recipe(1024, **changes)
    fake = rehearsal._rehearse(config, settings)
    monkeypatch.setattr(rehearsal, "_fake_model", real_model)
    real = rehearsal._rehearse(config, settings)
    for phase, held in real.items():
        for kind, size in held.items():
            assert fake[phase][kind] == pytest.approx(size, rel=0.01, abs=20_000), (phase, kind)


def test_occurring_rows_are_counted_once_the_shard_is_prepared(tmp_path: Path) -> None:
    config = small(vocab_size=4096)
    rows = recipe(1024, **{"adapter.embedding_rows": "occurring"}).model_copy(update={"run_dir": str(tmp_path)})
    before = memory(rows, config)
    assert before.optimizer == memory(recipe(1024), config).optimizer
    random_shard(RunFolder(tmp_path), 1024, rows=1)
    after = memory(rows, config)
    occurring = len(open_shard(RunFolder(tmp_path).train_shard, None).occurring_tokens())
    assert before.optimizer - after.optimizer == 8 * 64 * (4096 - occurring)
    assert after.peak < before.peak


def test_the_final_phase_with_full_attention_counts_where_it_takes_more() -> None:
    """Soft-capped scores are written out: a whole row of them is more than a group's."""
    config = small("gemma2", num_hidden_layers=2, sliding_window=64, query_pre_attn_scalar=16)
    config.layer_types = ["full_attention", "sliding_attention"]
    sparse, full = recipe(8192), recipe(8192, **{"attention.pattern": "full"})
    both = recipe(8192, **{"attention.full_attention_final_fraction": 0.1})
    peaks = [memory(each, config).peak for each in (sparse, full, both)]
    assert peaks[2] == max(peaks)


def test_layers_beyond_the_rehearsed_ones_are_counted_exactly() -> None:
    """Twelve layers from two and four, against twelve rehearsed."""
    config, settings = small(num_hidden_layers=12), recipe(2048)
    made = rehearse(config, settings).at(2048)
    whole = rehearsal._rehearse(config, settings)
    for phase, held in whole.items():
        assert sum(made[phase].values()) == pytest.approx(sum(held.values()), rel=0.01), phase


def test_a_long_context_is_on_the_line_through_two_shorter_ones() -> None:
    config, settings = small(), recipe(65536)
    made, whole = rehearse(config, settings).at(65536), rehearsal._rehearse(config, settings)
    for phase, held in whole.items():
        assert sum(made[phase].values()) == pytest.approx(sum(held.values()), rel=0.01), phase


def test_memory_grows_with_the_context_and_the_model() -> None:
    peaks = [memory(recipe(context)).peak for context in (4096, 8192, 16384)]
    assert peaks == sorted(peaks)
    # A straight line: what the attention path holds is O(T).
    assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.05)
    deeper = [memory(recipe(), small(num_hidden_layers=count)).peak for count in (2, 4, 16)]
    assert deeper == sorted(deeper)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"train.loss_chunk_tokens": 128}, "temporary"),
        ({"train.activation_checkpointing": True}, "saved_activations"),
        ({"train.activation_checkpointing_every": 1}, "saved_activations"),
        ({"train.micro_batch_size": 1}, None),
        ({"train.grad_accum_steps": 1}, "gradients"),
        ({"adapter.train_embeddings": False}, "trained_weights"),
        ({"model.dtype": "bfloat16"}, "frozen_weights"),
        ({"model.quantization": "nf4"}, "frozen_weights"),
        ({"train.optimizer": "adamw_8bit"}, "optimizer"),
        ({"train.activation_offload": True}, "saved_activations"),
    ],
    ids=str,
)
def test_each_lever_lowers_its_part_and_the_peak(settings: dict[str, Any], part: str | None) -> None:
    # Without the lever:
    off = {
        "train.loss_chunk_tokens": 4096,
        "train.activation_checkpointing": False,
        "train.activation_checkpointing_every": 2,
        "train.micro_batch_size": 2,
        "train.grad_accum_steps": 2,
        "model.dtype": "float32",
    }
    (key,) = settings
    config = small(num_hidden_layers=4, vocab_size=4096)
    plain = {"train.grad_accum_steps": 1, **({key: off[key]} if key in off else {})}
    before, after = (memory(recipe(4096, **values), config) for values in (plain, plain | settings))
    assert part is None or after.parts[part] < before.parts[part]
    assert after.peak < before.peak


def test_a_tiled_mlp_lowers_what_a_layer_takes() -> None:
    config = small(intermediate_size=1024)
    before, after = (
        memory(recipe(8192, **{"train.loss_chunk_tokens": 128, **tiles}), config)
        for tiles in ({}, {"train.mlp_tile_tokens": 512})
    )
    assert after.temporary < 0.6 * before.temporary


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}),
        ("gemma3_text", {"num_hidden_layers": 6, "sliding_window": 64}),
        ("gemma2", {"sliding_window": 64}),
        ("gpt_neox", {"tie_word_embeddings": False}),
    ],
)
def test_other_architectures_are_rehearsed(kind: str, sizes: dict[str, Any]) -> None:
    assert memory(recipe(1024, **{"attention.group_size": 256}), small(kind, **sizes)).temporary > 0


def test_on_a_cpu_experts_cost_kernels_up_to_a_limit() -> None:
    sizes = {"num_experts": 8, "moe_intermediate_size": 32, "num_experts_per_tok": 2}

    def extra(context: int, machine: Machine, **changed: Any) -> int:
        config = small("qwen3_moe", **sizes | changed)
        made = memory(recipe(context, **{"attention.group_size": 256}), config, machine)
        tensors = made.peak - made.process - made.allocator
        return made.allocator - round(machine.allocator_share * tensors)

    # An expert gets 1,024 of 4,096 tokens; the numbers within two deviations are 4 * 32, of 4 products each.
    assert extra(4096, this_machine()) == round(4 * 4 * 32 * 0.7e6)
    assert extra(2**20, this_machine()) == round(1024 * 0.7e6)
    assert extra(4096, gpu("l4")) == 0
    assert extra(4096, this_machine(), num_experts=1, num_experts_per_tok=1) == 0


def test_data_parallel_training_holds_gradients_in_buckets_as_well() -> None:
    one, two = (memory(recipe(), machine=gpu("l4", count)) for count in (1, 2))
    assert two.gradients - one.gradients == 4 * outline(small(num_hidden_layers=3), recipe()).trained


def test_a_shorter_model_keeps_its_lists_in_step() -> None:
    short = with_layers(small("gemma3_text", num_hidden_layers=6), 4)
    assert short.num_hidden_layers == len(short.layer_types) == 4


def test_llama_2_7b_at_100k_fits_an_a100() -> None:
    """The paper needed eight of them for 100k tokens (table 4)."""
    settings = recipe(102400, **{"attention.group_size": 2048})
    assert memory(settings, llama_2_7b(), gpu("a100-80g")).peak < 80e9


def test_what_is_offloaded_must_fit_into_main_memory() -> None:
    parts = {field.name: 0 for field in fields(Memory) if field.name != "moment"}
    made = Memory(**{**parts, "temporary": 100, "offloaded": 50}, moment="")
    machine = this_machine()
    for memory, host, room in ((100, 50, True), (99, 50, False), (100, 49, False)):
        assert fits(made, replace(machine, memory_bytes=memory, host_bytes=host)) == room


def test_weights_in_4_bits_take_what_they_and_their_scales_take() -> None:
    """Three layers of 30,720 quantizable weights, and the largest of them expanded while it is used."""
    config = small(num_hidden_layers=3)
    plain, made = (
        peak_memory(config, each, outline(config, each), this_machine())
        for each in (recipe(1024), recipe(1024, **{"model.quantization": "nf4"}))
    )
    assert plain.frozen_weights - made.frozen_weights == pytest.approx(3 * 30_720 * (2 - 0.516), abs=1)
    assert made.temporary - plain.temporary == 64 * 96 * 2

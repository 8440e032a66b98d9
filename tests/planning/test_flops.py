"""FLOPs against the paper's table 11, the definition of the pattern, and matrices counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
from planning_cases import PAPER, llama_2_7b, recipe, small

from longlora.attention.pattern import FULL, Pattern, S2Pattern, WindowPattern, may_attend
from longlora.planning.flops import attended_pairs, forward_flops, step_flops
from longlora.planning.outline import outline

# Tokens; scores with full attention and with S2-Attn, projections, MLP, other, and both totals, in 10^12 (table 11).
TABLE_11 = [
    (8192, 35.2, 8.8, 35.2, 70.9, 143.5, 117.1),
    (16384, 140.7, 35.2, 70.4, 141.8, 357.2, 251.7),
    (32768, 562.9, 140.7, 140.7, 283.7, 996.0, 573.8),
    (65536, 2251.8, 562.9, 281.5, 567.4, 3118.0, 1429.1),
]


@pytest.mark.parametrize("row", TABLE_11, ids=lambda row: str(row[0]))
def test_table_11_within_one_percent(row: tuple[float, ...]) -> None:
    tokens, full, sparse, projections, mlp, total_full, total_sparse = row
    for pattern, scores, total in (("full", full, total_full), ("s2", sparse, total_sparse)):
        settings = {**PAPER, "attention.pattern": pattern, "adapter.train_embeddings": False}
        made = forward_flops(outline(llama_2_7b(), recipe(int(tokens), **settings)), int(tokens), "paper")
        assert made.attention_scores / 1e12 == pytest.approx(scores, rel=0.01)
        assert made.attention_projections / 1e12 == pytest.approx(projections, rel=0.01)
        assert made.mlp / 1e12 == pytest.approx(mlp, rel=0.01)
        # The paper measured models without LoRA in them.
        assert (made.total - made.lora) / 1e12 == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 20, 33])
@pytest.mark.parametrize("pattern", [S2Pattern(8), S2Pattern(8, 3), S2Pattern(4, 1), WindowPattern(5), FULL])
def test_pairs_are_those_of_the_definition(pattern: Pattern, length: int) -> None:
    for shifted in (False, True) if isinstance(pattern, S2Pattern) and pattern != FULL else (False,):
        expected = sum(
            may_attend(query, key, length, pattern, shifted=shifted) for query in range(length) for key in range(length)
        )
        assert attended_pairs(length, pattern, shifted=shifted) == expected


def test_scores_are_linear_for_a_fixed_group_and_quadratic_for_full_attention() -> None:
    def scores(context: int, pattern: str) -> float:
        settings = {"attention.pattern": pattern, "attention.group_size": 1024}
        return forward_flops(outline(small(), recipe(context, **settings)), context).attention_scores

    assert scores(65536, "s2") == pytest.approx(2 * scores(32768, "s2"), rel=0.01)
    assert scores(65536, "full") == pytest.approx(4 * scores(32768, "full"), rel=0.01)
    assert scores(65536, "s2") < scores(65536, "full") / 25


def test_windows_keep_their_cost() -> None:
    config = small(
        "gemma3_text", num_hidden_layers=6, sliding_window=128, max_position_embeddings=4096, tie_word_embeddings=True
    )
    model = outline(config, recipe(8192))
    windows = [layer.pattern for layer in model.layers if isinstance(layer.pattern, WindowPattern)]
    assert windows == [WindowPattern(128)] * 5
    assert model.layers[5].pattern == S2Pattern(256, 4)


def test_only_chosen_experts_count() -> None:
    sizes = {"num_experts": 8, "moe_intermediate_size": 32}
    one, two = (
        forward_flops(outline(small("qwen3_moe", num_experts_per_tok=k, **sizes), recipe()), 1024).mlp for k in (1, 2)
    )
    expert = 3 * 64 * 32  # gate, up and down
    assert two - one == 2 * 1024 * 2 * expert  # two layers
    router = 2 * 64 * 8
    assert one == 2 * 1024 * (2 * expert + router)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_costs_the_same_tied_or_not_forward_and_more_backward_where_it_is_trained(tied: bool) -> None:
    settings = recipe()
    model = outline(small(tie_word_embeddings=tied), settings)
    step = step_flops(model, settings.train, 1024, 1)
    assert step.forward.output_head == 2 * 1024 * 512 * 64
    assert step.recomputed.output_head == 0
    assert step.backward.output_head == step.forward.output_head * (2 if tied else 1)


def test_full_fine_tuning_takes_the_gradients_of_the_weights_as_well() -> None:
    config = small(tie_word_embeddings=False)
    lora, full = recipe(), recipe(**{"adapter.method": "full"})
    steps = [step_flops(outline(config, each), each.train, 1024, 1) for each in (lora, full)]
    assert steps[1].forward.lora == 0
    for part in ("attention_projections", "mlp", "output_head"):
        forward = getattr(steps[1].forward, part)
        assert forward == getattr(steps[0].forward, part) > 0
        assert [getattr(step.backward, part) / forward for step in steps] == [1, 2]
    assert steps[0].backward.attention_scores == steps[1].backward.attention_scores


def test_recomputation_follows_checkpointing() -> None:
    def recomputed(**settings: Any) -> float:
        made = recipe(**settings)
        step = step_flops(outline(small(), made), made.train, 8192)
        assert step.total == pytest.approx(step.forward.total + step.recomputed.total + step.backward.total)
        return step.recomputed.total

    every = recomputed()
    assert recomputed(**{"train.activation_checkpointing_every": 2}) == pytest.approx(every / 2)
    assert recomputed(**{"train.activation_checkpointing": False}) == 0
    tiled = recomputed(**{"train.activation_checkpointing": False, "train.mlp_tile_tokens": 256})
    assert 0 < tiled < every

"""Floating-point operations of a forward pass and of a training step, by part, from an `Outline` alone.

A multiplication and an addition are two operations. Two ways of counting attention: `causal` counts the pairs of query
and key that the pattern really has; `paper` gives every token as many keys as its group has tokens, as table 11 does.
Norms, activations and RoPE are left out: a thousandth of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from longlora.attention.pattern import Pattern, S2Pattern, WindowPattern, runs, shifted_heads
from longlora.config import TrainConfig
from longlora.planning.outline import AttentionLayer, Outline

Counting = Literal["causal", "paper"]
# Matrix products of flash attention: two in a forward pass; backward makes the scores again and four gradients.
_SCORES_BACKWARD = 5 / 2


@dataclass(frozen=True)
class Flops:
    """Operations by part."""

    attention_scores: float = 0.0
    """Scores and weighted sums: what the pattern makes cheaper."""
    attention_projections: float = 0.0
    """Query, key, value and output matrices."""
    mlp: float = 0.0
    """Everything else inside the layers; of experts, the chosen ones."""
    lora: float = 0.0
    output_head: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class StepFlops:
    """Operations of one optimizer step on one device."""

    forward: Flops
    recomputed: Flops
    """The layers once more in the backward pass, where activations are not kept."""
    backward: Flops

    @property
    def total(self) -> float:
        return self.by_part.total

    @property
    def by_part(self) -> Flops:
        return self.forward + self.recomputed + self.backward

    def times(self, count: float) -> StepFlops:
        """As many of it."""
        return StepFlops(*(_times(each, count) for each in (self.forward, self.recomputed, self.backward)))


def forward_flops(model: Outline, tokens: int, counting: Counting = "causal") -> Flops:
    """One forward pass of one document of `tokens` tokens."""
    return Flops(
        attention_scores=sum(score_flops(layer, tokens, counting) for layer in model.layers),
        attention_projections=2.0 * tokens * model.projections_used,
        mlp=2.0 * tokens * model.mlp_used,
        lora=2.0 * tokens * model.lora,
        output_head=2.0 * tokens * model.head_used,
    )


def step_flops(model: Outline, train: TrainConfig, tokens: int, sequences: int | None = None) -> StepFlops:
    """One optimizer step over `sequences` rows of `tokens` tokens each; as many as `train` says if None.

    Frozen matrices need the gradient of their input only, trained ones that of the weights too. The chunked loss
    computes its gradients right away and recomputes nothing.
    """
    one = forward_flops(model, tokens)
    weights = 2 if model.layers_trained else 1
    sequences = train.micro_batch_size * train.grad_accum_steps if sequences is None else sequences
    again = 1 / train.activation_checkpointing_every if train.activation_checkpointing else 0.0
    # A tiled MLP is computed again in any case, but never a third time.
    mlp_again = 1.0 if train.mlp_tile_tokens is not None and train.mlp_tile_tokens < tokens else again
    forward = _times(one, sequences)
    recomputed = Flops(
        again * one.attention_scores, again * one.attention_projections, mlp_again * one.mlp, again * one.lora
    )
    backward = Flops(
        attention_scores=one.attention_scores * _SCORES_BACKWARD,
        attention_projections=weights * one.attention_projections,
        mlp=weights * one.mlp,
        lora=2 * one.lora,
        output_head=one.output_head * (2 if model.head_trained else 1),
    )
    return StepFlops(forward, _times(recomputed, sequences), _times(backward, sequences))


def score_flops(layer: AttentionLayer, tokens: int, counting: Counting = "causal") -> float:
    """Scores (query times key) and weighted sums (weight times value) of one layer, forward."""
    per_pair = 2 * (layer.width + layer.value_width)
    if counting == "paper":
        return float(per_pair * layer.heads * tokens * min(_reach(layer.pattern), tokens))
    shift = layer.pattern.shift if isinstance(layer.pattern, S2Pattern) else "none"
    moved = shifted_heads(layer.heads, shift)
    pairs = (layer.heads - moved) * attended_pairs(tokens, layer.pattern, shifted=False)
    pairs += moved * attended_pairs(tokens, layer.pattern, shifted=True) if moved else 0
    return float(per_pair * pairs)


def attended_pairs(tokens: int, pattern: Pattern, *, shifted: bool) -> int:
    """Pairs of query and key in one head over a document of `tokens` tokens: the ones of `may_attend`."""
    pairs = 0
    for run in runs(tokens, pattern, shifted=shifted):
        if run.history:
            pairs += run.count * run.size * (run.history + 1)
        else:
            pairs += run.count * (run.size * (run.size + 1) // 2 + run.size * run.sinks)
    return pairs


def paper_attention_tflops(tokens: int, group_size: int, layers: int, hidden: int) -> float:
    """Scores and weighted sums of one forward pass in 10^12 operations, as the paper's table 11 counts them.

    Each token meets `group_size` keys, twice (scores, sums), a multiplication and an addition each. The half that
    causality saves is not subtracted. Sink tokens are left out: put in front of the queries and the keys of a group
    they add about 2 * sink_tokens / group_size.
    """
    return 4 * tokens * min(group_size, tokens) * hidden * layers / 1e12


def paper_linear_tflops(tokens: int, layers: int, hidden: int, mlp: int) -> float:
    """The same for the linear layers of a Llama: q, k, v and output projections, and the three matrices of the MLP."""
    return (8 * tokens * hidden**2 + 6 * tokens * hidden * mlp) * layers / 1e12


def _reach(pattern: Pattern) -> int:
    return pattern.size if isinstance(pattern, WindowPattern) else pattern.group_size


def _times(flops: Flops, count: float) -> Flops:
    return Flops(*(getattr(flops, field.name) * count for field in fields(flops)))

"""In what order prompts are answered, which of them together, and what each step costs. Token counts alone, no model.

Sorted by their tokens, prompts that begin alike are neighbours, and what a prompt has in common with any earlier one it
has in common with the one before: a KV cache of that one is all that has to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longlora.evaluation.retrieval.prompt import Prompt
from longlora.model.kv_cache import common

_PASS_TOKENS = 64
"""What a forward pass costs however few tokens it has, in tokens of a long one: the weights are read either way."""
_KIN = 0.25
"""Part of the shorter of two neighbours that they have in common if sharing is weighed against batching for both."""


@dataclass(frozen=True)
class Step:
    """Prompts that are answered together: one, or several side by side."""

    indices: tuple[int, ...]
    """Which of the prompts."""
    shared: int
    """Tokens of it that the KV cache holds from the prompt before; none for several."""
    fresh: int
    """Tokens that are read, padding included."""
    cost: float
    """Relative time at most: tokens weighted by how many they attend to, and a share for each forward pass."""


@dataclass(frozen=True)
class Order:
    """How a reader works.

    Args:
        chunk_tokens: tokens of a forward pass at most, over all rows.
        batch_tokens: tokens that are read side by side at most, padding included; 1: each prompt by itself.
        even_tokens: tokens at which attending to them costs as much as all else a token costs.
    """

    chunk_tokens: int
    batch_tokens: int
    even_tokens: float

    def steps(self, prompts: Sequence[Prompt]) -> list[Step]:
        """Every prompt in one step: first groups that are read side by side, then one by one in the order of tokens."""
        ranked = sorted(range(len(prompts)), key=lambda index: prompts[index].tokens)
        groups = self._groups(prompts, ranked) if self.batch_tokens > 1 else []
        steps = [self._step(prompts, group) for group in groups]
        grouped = {index for group in groups for index in group}
        before: Sequence[int] = ()
        for index in ranked:
            if index not in grouped:
                steps.append(self._step(prompts, [index], common(before, prompts[index].tokens)))
                before = prompts[index].tokens
        return steps

    def _groups(self, prompts: Sequence[Prompt], ranked: Sequence[int]) -> list[list[int]]:
        """Prompts that cost less side by side than one after the other with what they share."""
        strangers: list[int] = []
        for family in _families(prompts, ranked):
            sharing = 0.0
            before: Sequence[int] = ()
            for index in family:
                sharing += self._step(prompts, [index], common(before, prompts[index].tokens)).cost
                before = prompts[index].tokens
            if sum(self._step(prompts, group).cost for group in self._packed(prompts, family)) <= sharing:
                strangers += family
        return [group for group in self._packed(prompts, strangers) if len(group) > 1]

    def _packed(self, prompts: Sequence[Prompt], indices: Sequence[int]) -> list[list[int]]:
        """Groups of similar length, longest first: a prompt joins the last one if that costs less than to be alone."""
        groups: list[list[int]] = []
        for index in sorted(indices, key=lambda index: -len(prompts[index].tokens)):
            if groups:
                joined = self._step(prompts, [*groups[-1], index])
                apart = self._step(prompts, groups[-1]).cost + self._step(prompts, [index]).cost
                if joined.fresh <= self.batch_tokens and joined.cost < apart:
                    groups[-1].append(index)
                    continue
            groups.append([index])
        return groups

    def _step(self, prompts: Sequence[Prompt], indices: Sequence[int], shared: int = 0) -> Step:
        asked = [prompts[index] for index in indices]
        width = max(len(prompt.tokens) for prompt in asked)
        fresh = len(asked) * (width - shared)
        spoken = max(prompt.max_new_tokens for prompt in asked)
        forced = max(len(prompt.answer) for prompt in asked)
        passes = -(-fresh // self.chunk_tokens) + spoken + (forced > 1)
        tokens = fresh * (1 + (shared + width) / 2 / self.even_tokens) + len(asked) * (spoken + forced)
        return Step(tuple(indices), shared, fresh, tokens + _PASS_TOKENS * passes)


def _families(prompts: Sequence[Prompt], ranked: Sequence[int]) -> list[list[int]]:
    """Runs of prompts, in the order of their tokens, of which each has much in common with the one before."""
    families: list[list[int]] = []
    before: Sequence[int] = ()
    for index in ranked:
        tokens = prompts[index].tokens
        if not families or common(before, tokens) < _KIN * min(len(before), len(tokens)):
            families.append([])
        families[-1].append(index)
        before = tokens
    return families

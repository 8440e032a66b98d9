"""When training is sparse and when it is full: the attention part of a recipe, applied to a model step by step."""

from __future__ import annotations

import math
from typing import Any

from peft import PeftModel
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from longlora.attention.registry import describe_attention, use_s2
from longlora.config import Recipe
from longlora.errors import UnsupportedModelError


class AttentionSchedule(TrainerCallback):  # type: ignore[misc]
    """Sparse attention up to the final phase, full attention in it.

    Both isolate packed documents in O(T) memory. With ``pattern: full`` an architecture that S2-Attn does not support
    is trained with its own attention.

    The phase is decided by the number of the step alone, so that a resumed run does what an uninterrupted one does.
    """

    def __init__(self, model: PeftModel, recipe: Recipe, console: Console) -> None:
        self._model = model
        self._settings = recipe.attention
        self._group_size = recipe.attention.resolve_group_size(recipe.context.context_length)
        final = math.ceil(recipe.train.steps * recipe.attention.full_attention_final_fraction)
        self._first_full_step = 0 if recipe.attention.pattern == "full" else recipe.train.steps - final
        self._console = console
        self._full: bool | None = None
        self._apply(full=self._first_full_step == 0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Switch where the final phase begins, or where a resumed run is in it."""
        self._apply(full=state.global_step >= self._first_full_step)

    def _apply(self, *, full: bool) -> None:
        if full == self._full:
            return
        self._full = full
        settings = self._settings
        try:
            use_s2(
                self._model,
                group_size=self._group_size,
                sink_tokens=settings.sink_tokens,
                shift=settings.shift,
                full_attention_layers="all" if full else settings.full_attention_layers,
                backend=settings.backend,
            )
        except UnsupportedModelError:
            # Full attention needs nothing of ours; what the model has is then said in the line below.
            if settings.pattern != "full":
                raise
        self._console.print(f"attention in training: {describe_attention(self._model)}", highlight=False)

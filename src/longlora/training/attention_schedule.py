"""When training is sparse and when it is full: the attention part of a recipe, applied to a model step by step."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from longlora.attention.registry import describe_attention
from longlora.config import Recipe
from longlora.model.attention import apply_attention, full_attention_steps
from longlora.model.trainable import TrainedModel


class AttentionSchedule(TrainerCallback):  # type: ignore[misc]
    """Sparse attention up to the final phase, full attention in it.

    Both isolate packed documents in O(T) memory. With ``pattern: full`` an architecture that S2-Attn does not support
    is trained with its own attention.

    The phase is decided by the number of the step alone, so that a resumed run does what an uninterrupted one does.
    """

    def __init__(self, model: TrainedModel, recipe: Recipe, console: Console) -> None:
        self._model = model
        self._settings, self._context_length = recipe.attention, recipe.context.context_length
        self._first_full_step = _full_phase(recipe).start - 1  # counted from 0
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
        apply_attention(self._model, self._settings, self._context_length, full=full)
        self._console.print(f"attention in training: {describe_attention(self._model)}", highlight=False)


def moved_full_phase(before: Recipe, now: Recipe, done: int) -> str:
    """What other `train.steps` in a resumed run do to the final phase, after `done` steps; empty if it stays.

    The phase belongs to the end of the run, so it moves with it: what was trained is not undone, and is said.
    """
    was, will = _full_phase(before), _full_phase(now)
    if was == will or not will or now.attention.pattern == "full":
        return ""
    parts = [
        f"train.steps was {before.train.steps} and is {now.train.steps}: the phase with full attention was to be "
        f"{_steps(was)} and is {_steps(will)}"
    ]
    if early := range(was.start, min(done + 1, will.start)):
        parts.append(f"{_steps(early)} had full attention already")
        if again := range(done + 1, will.start):
            parts.append(f"{_steps(again)} will be sparse again")
    if late := range(will.start, min(done + 1, was.start)):
        parts.append(f"{_steps(late)} had sparse attention")
    return "; ".join(parts)


def _full_phase(recipe: Recipe) -> range:
    """Steps, counted from 1, of the final phase with full attention."""
    return range(recipe.train.steps - full_attention_steps(recipe) + 1, recipe.train.steps + 1)


def _steps(steps: range) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]}-{steps[-1]}"

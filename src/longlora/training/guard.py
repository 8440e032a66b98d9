"""What may reach the weights, and what a person is told of the rest.

In: the losses, labels and gradient norm of each step. Out: whether the optimizer may take it, the same on every
process, and logs without hidden zeros. A step is left out as a whole, with its rows: its number, the learning rate and
the rows that come next are as if it had been taken, so that they depend on nothing but the number of the step.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from longlora.artifacts import RunFolder
from longlora.config import Recipe
from longlora.data.packing import PackedDataset
from longlora.data.stretches import Stretch
from longlora.errors import ModelError, RunFolderError
from longlora.model.trainable import weights_file
from longlora.training.checkpoint import newest_checkpoint
from longlora.training.collectives import from_main, gathered, largest
from longlora.training.distributed import Ranks

_SHOWN = 5
"""Documents, or processes, that a message names."""


@dataclass
class _Interval:
    """What happened since the last row of the log."""

    steps: int = 0
    skipped: int = 0
    unlabelled: int = 0


class StepGuard(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Keeps a loss or gradient that is no number, and steps that teach nothing, away from the optimizer.

    A callback only so that checkpoints have what it counts. R ranks, M micro batches of a step on each of them.
    """

    def __init__(self, dataset: PackedDataset, ranks: Ranks, console: Console, recipe: Recipe) -> None:
        """`console` is quiet on all processes but one."""
        self._dataset, self._ranks, self._console, self._recipe = dataset, ranks, console, recipe
        self._train = recipe.train
        self._losses: list[Tensor] = []
        self._stretches: list[Stretch] = []
        self._skipped = 0
        self._interval = _Interval()
        self._unlabelled_said = False
        self._spikes = SpikeWatch()
        self.is_unlabelled = False
        """Whether the step under way has no token to predict, on any process."""

    def state(self) -> dict[str, Any]:
        """For trainer_state.json."""
        attributes = {
            "skipped": self._skipped,
            "interval": asdict(self._interval),
            "unlabelled_said": self._unlabelled_said,
            "spikes": self._spikes.state(),
        }
        return {"args": {}, "attributes": attributes}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Nothing in a run that begins, and nothing of use in a state that was put together by hand.
        known = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        self._skipped, self._interval = known["skipped"], _Interval(**known["interval"])
        self._unlabelled_said, self._spikes = known["unlabelled_said"], SpikeWatch(**known["spikes"])

    @property
    def begins(self) -> bool:
        """Whether no micro batch of the step under way has been seen."""
        return not self._losses

    def begin(self, step: int, weights_RM: Tensor, stretches: Sequence[Stretch]) -> Tensor:
        """The weight of the whole step, to divide its losses by: never 0. All processes must call.

        Args:
            step: from 1.
            weights_RM: of each micro batch, what its predictions weigh (`weight_of_batches`).
            stretches: of this process's micro batches.
        """
        total = weights_RM.sum(1).sum()
        ranks = self._ranks
        # A stretch without labels may be of a row that has some.
        empty_DM = weights_RM.unflatten(0, (ranks.data_world, ranks.sequence_world)).sum(1).cpu() == 0
        self.is_unlabelled = bool(empty_DM.all())
        if not empty_DM.any():
            return total
        # Ranks that are left over at the end of an epoch have no rows, which is nothing to tell.
        with_rows = zip(stretches, empty_DM[ranks.data_rank].tolist(), strict=True)
        own = [self._documents([stretch]) for stretch, empty in with_rows if empty and stretch.rows]
        everywhere = gathered(ranks, own)[:: ranks.sequence_world]
        unlabelled = [documents for of_rank in everywhere for documents in of_rank]
        self._interval.unlabelled += len(unlabelled)
        if unlabelled and not self._unlabelled_said:
            self._unlabelled_said = True
            self._say(
                f"WARNING: step {step} predicts nothing in {len(unlabelled)} of {empty_DM.numel()} micro batches, of "
                f"{_first([name for of_batch in unlabelled for name in of_batch])}; "
                f"{'the step is left out' if self.is_unlabelled else 'they teach nothing'}; metrics.jsonl counts such "
                "in unlabelled_batches, and this is said once"
            )
        return torch.where(total == 0, torch.ones_like(total), total)

    def saw(self, loss: Tensor, stretch: Stretch) -> None:
        """A micro batch of the step, after its backward pass."""
        self._losses.append(loss)
        self._stretches.append(stretch)

    def may_step(self, step: int, norm: Tensor | float) -> bool:
        """Whether the optimizer may take step `step`; the same on all processes, all of which must call.

        Args:
            step: from 1.
            norm: of the gradient, before it was clipped.

        Raises:
            ModelError: it may not, and more steps than the recipe bears were left out because of numbers that are none.
        """
        finite = torch.stack(self._losses).isfinite().tolist()
        values = [loss for loss, good in zip(self._losses, finite, strict=True) if not good]
        bad = [stretch for stretch, good in zip(self._stretches, finite, strict=True) if not good]
        every = self._stretches
        self._losses, self._stretches = [], []
        self._interval.steps += 1
        if self.is_unlabelled:
            self._interval.skipped += 1
            return False
        good_norm = math.isfinite(float(norm))
        if not largest(self._ranks, float(bool(bad) or not good_norm)):
            return True
        what = f"loss is {values[0].item()}" if values else ""
        reason = self._reason(what, bad, every, f"gradient norm is {float(norm)}")
        self._interval.skipped += 1
        self._skipped += 1
        if self._skipped > self._train.max_skipped_steps:
            raise self._too_many(step, reason)
        self._say(
            f"WARNING: step {step} is left out: {reason}; weights and optimizer stay as they were "
            f"({self._skipped} of train.max_skipped_steps={self._train.max_skipped_steps})"
        )
        return False

    def logged(self, logs: dict[str, Any], step: int) -> dict[str, Any]:
        """The library's logs with the loss of the steps that were taken, and counts; None for what is no number."""
        interval, self._interval = self._interval, _Interval()
        loss, norm, taken = logs["loss"], logs.get("grad_norm"), interval.steps - interval.skipped
        if interval.skipped:  # the sum of those taken was divided by the number of all
            loss = loss * interval.steps / taken if taken else None
        if loss is not None and (median := self._spikes.above(loss)) is not None:
            self._say(
                f"WARNING: loss spike in step {step}: {loss:.4f}, and {median:.4f} is the median of the last steps; if "
                f"it does not come back, train in another run_dir with a lower train.learning_rate (now "
                f"{self._train.learning_rate:g}) or more train.warmup_steps (now {self._train.warmup_steps})"
            )
        counts = {"skipped_steps": interval.skipped, "unlabelled_batches": interval.unlabelled}
        return {**logs, "loss": loss, "grad_norm": norm if norm is None or math.isfinite(norm) else None, **counts}

    def _reason(self, what: str, bad: Sequence[Stretch], every: Sequence[Stretch], norm: str) -> str:
        """What is wrong with a step, on which ranks and in which documents, from all processes."""
        found = gathered(self._ranks, (what, self._documents(bad), self._documents(every)))
        ranks = [f"{words} on rank {rank}" for rank, (words, _, _) in enumerate(found) if words]
        if not ranks:  # which micro batch it came from is lost in the sum
            return f"{norm}, from {_first([name for _, _, names in found for name in names])}"
        words = _first(ranks) if self._ranks.world > 1 else what
        return f"{words}, in {_first([name for _, names, _ in found for name in names])}"

    def _documents(self, stretches: Sequence[Stretch]) -> list[str]:
        return [name for stretch in stretches for row in stretch.rows for name in self._dataset.documents(row)]

    def _too_many(self, step: int, reason: str) -> ModelError:
        return ModelError(
            f"step {step}: {reason}; it was not taken; steps left out before: {self._skipped - 1}, "
            f"train.max_skipped_steps={self._train.max_skipped_steps}; {from_main(self._ranks, self._last_good)}; "
            f"train without these documents or with a lower train.learning_rate (now {self._train.learning_rate:g}) in "
            "another run_dir, or resume with a higher train.max_skipped_steps"
        )

    def _last_good(self) -> str:
        try:
            folder = RunFolder(self._recipe.run_path).checkpoints
            checkpoint, _ = newest_checkpoint(folder, weights_file(self._recipe.adapter))
        except RunFolderError:
            return "there is no whole checkpoint yet"
        return f"the last whole checkpoint is {checkpoint}"

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False)


class SpikeWatch:
    """Finds losses far above those before, by median and median absolute deviation, which a spike hardly moves."""

    recent = 50
    """How many losses it compares with, of which it needs `least`."""
    least = 8
    deviations = 5.0
    smallest = 0.02
    """What at least counts as a deviation, as a part of the median: a smooth curve has next to none."""

    def __init__(self, losses: Sequence[float] = (), above: bool = False) -> None:
        """With what `state` of an earlier one gave, it goes on as that one."""
        self._losses = deque(losses, maxlen=self.recent)
        self._above = above

    def state(self) -> dict[str, Any]:
        """What it was told, for JSON."""
        return {"losses": list(self._losses), "above": self._above}

    def above(self, loss: float) -> float | None:
        """The median, if `loss` is a spike and the loss before was none."""
        known, was_above = list(self._losses), self._above
        self._losses.append(loss)
        if len(known) < self.least:
            return None
        median = statistics.median(known)
        # 1.4826 makes it the standard deviation of normally distributed losses.
        deviation = 1.4826 * statistics.median(abs(value - median) for value in known)
        limit = median + self.deviations * max(deviation, self.smallest * abs(median))
        self._above = loss > limit
        return median if self._above and not was_above else None


def _first(names: Sequence[str]) -> str:
    """The first few different ones, and how many more there are."""
    different = list(dict.fromkeys(names))
    more = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
    return ", ".join(different[:_SHOWN]) + more or "no document"

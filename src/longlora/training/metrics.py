"""What a run says while it trains: one row per logged step in ``metrics.jsonl``, and a progress bar or plain lines."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from longlora.artifacts import write_atomic
from longlora.duration import clock


class MetricsCallback(TrainerCallback):  # type: ignore[misc]
    """Writes rows and shows progress. Columns: step, loss (nats per token, of the steps since the last row that were
    taken; null if none was), grad_norm (of the last step; null if it is no number), learning_rate, tokens (seen so
    far), tokens_per_second (of this process), seconds (of training; those of an earlier process up to the row that this
    one goes on from), skipped_steps and unlabelled_batches (micro batches in which nothing is predicted; both since the
    last row). The last step of a run has a row whatever `logging_steps` says."""

    def __init__(self, path: Path, console: Console) -> None:
        self._path = path
        self._console = console
        self._progress: Progress | None = None
        self._began = self._first_tokens = self._seconds_before = 0.0
        self._first_step = 0
        self.step = 0
        """The step that is under way, from 1; 0 before the first."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step = state.global_step + 1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began, self._first_tokens = time.monotonic(), float(state.num_input_tokens_seen)
        self._first_step = state.global_step
        if not state.is_world_process_zero:
            return
        # A fresh run drops the measurement before the first step of an earlier one as well.
        self._seconds_before = _keep_rows_until(self._path, state.global_step or -1)
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("train", total=state.max_steps, completed=state.global_step, status="")
            self._progress.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        seconds = time.monotonic() - self._began
        tokens = int(state.num_input_tokens_seen)
        row = {
            "step": state.global_step,
            "loss": logs["loss"],
            "grad_norm": logs["grad_norm"],
            "learning_rate": logs["learning_rate"],
            "tokens": tokens,
            "tokens_per_second": (tokens - self._first_tokens) / seconds,
            "seconds": self._seconds_before + seconds,
            "skipped_steps": logs["skipped_steps"],
            "unlabelled_batches": logs["unlabelled_batches"],
        }
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row, allow_nan=False) + "\n")
        loss = "no loss" if row["loss"] is None else f"loss {row['loss']:.4f}"
        norm = "none" if row["grad_norm"] is None else f"{row['grad_norm']:.3f}"
        left_out = f" ({row['skipped_steps']} left out)" if row["skipped_steps"] else ""
        status = f"{loss}{left_out}  {row['tokens_per_second']:.0f} tokens/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step, status=status)
        else:
            done = max(1, state.global_step - self._first_step)
            left = seconds / done * (state.max_steps - state.global_step)
            self._console.print(
                f"step {state.global_step}/{state.max_steps}  {status}  grad norm {norm}  "
                f"lr {row['learning_rate']:.2e}  elapsed {clock(seconds)}  left {clock(left)}",
                highlight=False,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _keep_rows_until(path: Path, step: int) -> float:
    """Drop rows that a resumed run will write again; the seconds of training up to the last one that stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if (of := _number(line, "step")) is not None and of <= step]
    write_atomic(path, "".join(f"{line}\n" for line in kept))
    return max((_number(line, "seconds") or 0.0 for line in kept), default=0.0)


def _number(line: str, key: str) -> float | None:
    try:
        return float(json.loads(line)[key])
    except (ValueError, KeyError, TypeError):  # the last line of a run that was killed while it wrote
        return None

"""Training steps of one variant, timed in a process of their own so that peak memory is that variant's alone.

``python -m longlora.bench.step JOB`` runs a job given as JSON and prints a `StepCost` as JSON.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from longlora.artifacts import RunFolder
from longlora.config import Recipe, build_recipe
from longlora.memory import allocator
from longlora.memory.allocator import keep_freed_memory, use_huge_pages
from longlora.memory.limit import peak_bytes

Variant = Literal["trainer", "roll", "longlora"]
"""``trainer``: transformers' Trainer with PEFT's LoRA, scaled_dot_product_attention, activation checkpointing and the
model's own loss. ``roll``: the same with the paper's Algorithm 1. ``longlora``: `longlora train`."""

_KILLED = -9
_LORA = {"r": 8, "lora_alpha": 16}


@dataclass(frozen=True)
class StepJob:
    """What to measure: `steps` optimizer steps of one row of `context_length` tokens, the first one not counted."""

    variant: Variant
    model: str
    """Folder of `random_model`."""
    folder: str
    """Where the run writes."""
    context_length: int
    steps: int = 3
    group_size: int | None = None
    """Of ``roll``."""
    values: dict[str, Any] = field(default_factory=dict)
    """Sections of the recipe, for ``longlora``."""
    return_freed: bool = False
    """Give freed memory back to the system, as ``longlora train`` does where memory is short; else keep it."""


@dataclass(frozen=True)
class StepCost:
    """What was measured."""

    seconds: float
    """Median of the steps after the first."""
    tokens: int
    """In a step."""
    peak_bytes: int
    """Of the process on a CPU (VmHWM), of torch's allocator on CUDA."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def measure_apart(job: StepJob) -> StepCost | str:
    """Run `job` in a process of its own; why it failed, in a line, if it did."""
    done = subprocess.run(
        [sys.executable, "-m", "longlora.bench.step", json.dumps(asdict(job))],
        capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    if done.returncode == _KILLED:
        return "out of memory (killed)"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return "out of memory" if "out of memory" in lines[-1].lower() else lines[-1][:200]
    return StepCost(**json.loads(done.stdout.splitlines()[-1]))


def recipe_of(job: StepJob) -> Recipe:
    """The recipe that ``longlora`` trains: the job's, on its model, with steps of one row."""
    values = copy.deepcopy(job.values)
    values |= {"run_dir": str(Path(job.folder) / "run")}
    values["context"] = {"context_length": job.context_length}
    values["model"] = values.get("model", {}) | {"name_or_path": job.model, "revision": None}
    # As `random_model` made it, whatever scaling the config began with.
    values["model"]["original_context_length"] = job.context_length // 2
    one_row = {"micro_batch_size": 1, "grad_accum_steps": 1, "warmup_steps": 0, "logging_steps": 1}
    values["train"] = values.get("train", {}) | one_row | {"steps": job.steps, "save_steps": job.steps + 1}
    # Every step shall be alike, and texts of eleven letters would make most rows needless.
    values["attention"] = values.get("attention", {}) | {"full_attention_final_fraction": 0.0}
    values["adapter"] = values.get("adapter", {}) | {"embedding_rows": "all"}
    return build_recipe(values)


def _measure(job: StepJob) -> StepCost:
    ends = _train_ours(job) if job.variant == "longlora" else _train_plain(job)
    times = [later - earlier for earlier, later in itertools.pairwise(ends)]
    return StepCost(statistics.median(times[1:] or times), job.context_length, peak_bytes())


def _train_ours(job: StepJob) -> list[float]:
    """Seconds at the beginning and at the end of each step."""
    from rich.console import Console

    from longlora.bench.inputs import random_shard
    from longlora.training.trainer import train

    keep_freed_memory()  # as the command line does; `train` returns what is freed where memory is short
    if job.return_freed:
        allocator.KEPT_GROWTH = math.inf
    recipe = recipe_of(job)
    run = RunFolder(recipe.run_path)
    random_shard(run, job.context_length, rows=job.steps)
    train(recipe, Console(file=sys.stderr))
    rows = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    return [0.0, *(row["seconds"] for row in rows)]


def _train_plain(job: StepJob) -> list[float]:
    """The same without us, but for Algorithm 1's attention function where it is asked for."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from longlora.attention.registry import use_s2
    from longlora.model.adapters import target_modules

    class Clock(TrainerCallback):  # type: ignore[misc]
        ends: list[float] = []

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(time.monotonic())

        on_step_end = on_train_begin

    base = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16, attn_implementation="sdpa")
    targets = target_modules(base, "attention")
    model = get_peft_model(base, LoraConfig(**_LORA, target_modules=targets, task_type="CAUSAL_LM"))
    if job.variant == "roll":
        assert job.group_size is not None
        use_s2(model, group_size=job.group_size, sink_tokens=0, wraparound=True)
    rows = torch.randint(256, (job.steps, job.context_length), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        output_dir=str(Path(job.folder) / "plain"),
        max_steps=job.steps,
        per_device_train_batch_size=1,
        bf16=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    clock = Clock()
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[clock]).train()
    return clock.ends


def main() -> None:
    """Run the job of the command line; if memory runs out, this is the process that the kernel shall kill."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    use_huge_pages()
    print(json.dumps(asdict(_measure(StepJob(**json.loads(sys.argv[1]))))))


if __name__ == "__main__":
    main()

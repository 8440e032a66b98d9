"""Standard benchmarks through lm-evaluation-harness on a model that is already built: rows with a metric each.

LongBench, BABILong, InfiniteBench, and whether short-context ability (ARC, HellaSwag, PIQA, ...) was kept. In: model,
tokenizer and names of tasks. Out: rows of plain values. lm_eval is an extra; its traps are in `tasks.py` (data,
network, names) and `model.py` (maximum length, where prompts are cut).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longlora.attention.registry import is_sparse
from longlora.errors import ModelError
from longlora.evaluation.harness.tasks import TaskSpec, libraries, load_tasks, require_lm_eval

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from longlora.evaluation.harness.model import HarnessModel

LM_EVAL_SEED = 1234
"""lm-eval's own seed for the choice of examples, with which published numbers are made."""

_CUT_IN_THE_MIDDLE = ("longbench", "infinitebench")
_BOOTSTRAPS = 1000


@dataclass(frozen=True)
class HarnessResult:
    """What was measured.

    `rows`: ``task, metric, value, stderr (or None), samples, num_fewshot, version, truncated`` (different prompts that
    were cut), and ``truncation`` (where) and ``higher_is_better`` (None where lm-eval does not say). The metric of a
    filter other than ``none`` is written ``exact_match,strict-match``. Groups have no rows of their own.
    `samples`: each question with its answers and scores. `settings`: what `run_harness` was asked for.
    """

    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    settings: dict[str, Any]
    seconds: float


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[TaskSpec] | Sequence[Task],
    *,
    max_length: int,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    truncation: Literal["middle", "left"] | None = None,
    batch_size: int = 1,
    seed: int = LM_EVAL_SEED,
    data: Mapping[str, Path] | None = None,
    download: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> HarnessResult:
    """Score `model` on `tasks` with full attention.

    Args:
        tasks: what `tasks.load_tasks` takes, or what it gave: then data, download and metadata are only noted.
        max_length: tokens of prompt and answer at most; prompts are cut to what the answer leaves of it.
        limit: questions per task, the first ones; None means all.
        truncation: where a prompt that is too long is cut; None means in the ``middle`` for LongBench and
            InfiniteBench, whose authors do so, and on the ``left`` for all others, as lm-eval does.
        batch_size: prompts side by side; 1 is right for long ones.
        seed: choice of few-shot examples and of lm-eval's bootstrap.
        data, download, metadata: see `tasks.load_tasks`.

    Raises:
        DataError: lm_eval is missing, a task is unknown, its data is missing, or an answer does not fit.
        ModelError: model or tokenizer bring their own code, or there is no chat template to use.
        AssertionError: the model is in training mode or would use the sparse pattern.
    """
    assert not is_sparse(model), "evaluation is always full attention"
    assert not model.training, "evaluation is always full attention, without dropout"
    refuse_own_code(model, tokenizer)
    if chat_template and not tokenizer.chat_template:
        raise ModelError(f"tokenizer of {tokenizer.name_or_path!r} has no chat template: leave out --chat-template")
    began = time.monotonic()
    lm_eval_version = require_lm_eval()
    from longlora.evaluation.harness.model import HarnessModel

    specs = [task for task in tasks if isinstance(task, (str, Mapping))]
    loaded: list[Task] = [task for task in tasks if not isinstance(task, (str, Mapping))]
    if specs:
        loaded += load_tasks(specs, data=data, num_fewshot=num_fewshot, download=download, metadata=metadata)
    cuts = {task.task_name: truncation or default_truncation(task.task_name) for task in loaded}
    with libraries(download):
        harness_model = HarnessModel(model, tokenizer, max_length=max_length, batch_size=batch_size, truncation=cuts)
        results = _evaluate(harness_model, loaded, limit, num_fewshot, chat_template, seed)
    settings = {
        "tasks": list(cuts),
        "max_length": max_length,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "chat_template": chat_template,
        "truncation": truncation,
        "batch_size": batch_size,
        "seed": seed,
        "data": {name: str(path) for name, path in (data or {}).items()},
        "metadata": dict(metadata or {}),
        "lm_eval": lm_eval_version,
    }
    rows = _rows(results, harness_model, cuts)
    return HarnessResult(rows, _samples(results), settings, time.monotonic() - began)


def _evaluate(
    model: HarnessModel,
    tasks: list[Task],
    limit: int | None,
    num_fewshot: int | None,
    chat_template: bool,
    seed: int,
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results: dict[str, Any] = simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),  # loaded tasks need no index, and that is slow to make
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=_BOOTSTRAPS,
        apply_chat_template=chat_template,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return results


def default_truncation(task: str) -> Literal["middle", "left"]:
    """Where the prompts of a task are cut by those who published it."""
    return "middle" if task.startswith(_CUT_IN_THE_MIDDLE) else "left"


def refuse_own_code(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ModelError` for a model or tokenizer with code of its own: some tasks load it by name and would run it."""
    where = []
    if getattr(model.config, "auto_map", None) or tokenizer.init_kwargs.get("auto_map"):
        where.append(model.name_or_path)
    for folder in {model.name_or_path, tokenizer.name_or_path} - {"", None}:
        for file in sorted(Path(folder).glob("*config.json")):
            if "auto_map" in json.loads(file.read_text(encoding="utf-8")):
                where.append(str(file))
    if where:
        raise ModelError(f"{where[-1]} names code of its own (auto_map), which is not run: use another model")


def _rows(results: Mapping[str, Any], model: HarnessModel, cuts: Mapping[str, str]) -> list[dict[str, Any]]:
    rows = []
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, has_filter, filtered = key.partition(",")
            unset = metric.isdigit() and value == -1  # a length that was not measured
            if not has_filter or metric.endswith("_stderr") or unset or not isinstance(value, Real):
                continue
            rows.append(
                {
                    "task": task,
                    "metric": metric if filtered == "none" else key,
                    "value": _finite(value),
                    "stderr": _finite(metrics.get(f"{metric}_stderr,{filtered}")),
                    "samples": results["n-samples"][task]["effective"],
                    "num_fewshot": results["n-shot"][task],
                    "version": results["versions"][task],
                    "truncated": model.truncated(task),
                    "truncation": cuts[task],
                    "higher_is_better": results["higher_is_better"][task].get(metric),
                }
            )
    return rows


def _samples(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "task": task,
            "document": sample["doc_id"],
            "filter": sample["filter"],
            "target": str(sample["target"]),
            "answers": _plain(sample["filtered_resps"]),
            "scores": {metric: _plain(sample[metric]) for metric in sample["metrics"]},
            "prompt_sha256": sample["prompt_hash"],
        }
        for task, samples in results["samples"].items()
        for sample in samples
    ]


def _finite(value: Any) -> float | None:
    """JSON has no NaN and no infinity; lm-eval's word for none is a string."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """`value` in the types of JSON."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, (bool, str)) or value is None:
        return value
    return _finite(value) if isinstance(value, Real) else str(value)

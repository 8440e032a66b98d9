"""Local files in the place of a benchmark's dataset, for a machine without a network.

In: a .jsonl, .json or .parquet file, a folder of them, or a copy of a dataset's repository. Out: settings of an
lm-evaluation-harness task that make it read them.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longlora.errors import DataError


def local_data(
    task: str, config: Mapping[str, Any], path: Path, num_fewshot: int | None, *, shared: bool
) -> dict[str, Any]:
    """Settings that make `task` read `path` instead of its dataset.

    Args:
        config: the settings of the task as lm-eval has them.
        num_fewshot: examples asked for; None means the task's own number.
        shared: `path` serves several tasks, so what belongs to this one must be named in it.

    Raises:
        DataError: `path` is missing or unreadable, or lacks the split to evaluate on or to take examples from.
    """
    if "class" in config:
        raise DataError(f"task {task} loads its data by code of its own: --data cannot replace it")
    splits = _splits(task, path, config, shared)
    wanted = config.get("test_split") or config.get("validation_split")
    evaluated = next(iter(splits)) if len(splits) == 1 and not shared else wanted
    if evaluated not in splits:
        raise DataError(f"task {task} is evaluated on split {wanted!r}, and {path} has {', '.join(splits)}")
    examples = config.get("fewshot_config") or {}
    source = examples.get("split") or config.get("fewshot_split") or config.get("training_split")
    own = config.get("num_fewshot")
    shots = own or 0 if num_fewshot is None or own == 0 else num_fewshot
    if shots and source not in splits and "samples" not in examples:
        raise DataError(
            f"task {task} takes {shots} examples from split {source!r}, which {path} does not have: give a "
            f"folder with {source}.jsonl and {wanted}.jsonl, or --num-fewshot 0"
        )
    training = config.get("training_split")
    return {
        "custom_dataset": lambda **_: splits,
        "dataset_kwargs": None,
        # lm-eval leaves a question out of its own examples only where both come from the test split.
        "test_split": evaluated,
        "validation_split": None,
        "training_split": training if training in splits else None,
        "fewshot_split": source if source in splits else None,
    }


def _splits(task: str, path: Path, config: Mapping[str, Any], shared: bool) -> Mapping[str, Any]:
    """The splits in a folder, or a file as the only one, ``test``."""
    from datasets import Dataset, get_dataset_config_names, load_dataset

    if not path.exists():
        raise DataError(f"data {path} does not exist: give a .jsonl, .json or .parquet file, or a folder of splits")
    if shared and not path.is_dir():
        raise DataError(f"data {path} is one file for several tasks: give {task} and each of the others one of its own")
    try:
        if not path.is_dir():
            return {"test": Dataset.from_list(_rows(path))}
        folder, wanted = str(path.resolve()), config.get("dataset_name")
        names = get_dataset_config_names(folder)
        if wanted not in names and (len(names) > 1 or (shared and wanted)):
            raise DataError(f"data {path} has no config {wanted!r}: it has {', '.join(names)}")
        return load_dataset(folder, wanted if wanted in names else names[0])
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"data {path} cannot be read ({first_line(error)}): give a .jsonl, .json or .parquet file, or a folder "
            "with one for each split"
        ) from error


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    elif path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    else:
        raise DataError(f"data {path} has an unknown type {path.suffix!r}: known are .jsonl, .json, .parquet")
    if not rows or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"data {path} holds no rows: each must be a JSON object with the columns of the dataset")
    return rows


def require_answers(task: Any, path: Path) -> None:
    """Refuse rows without a right answer, which lm-eval would score as wrong: published test splits often hide them.

    Raises:
        DataError: a row of a multiple-choice `task` (an `lm_eval.api.task.Task`) names none of its choices.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for number, row in enumerate(task.eval_docs, start=1):
        right = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
        choices = task.doc_to_choice(row)
        for each in right if isinstance(right, list) else [right]:
            if not (0 <= each < len(choices) if isinstance(each, int) else each in choices):
                raise DataError(
                    f"row {number} of {path} has no right answer for task {task.task_name} ({each!r} of "
                    f"{len(choices)} choices): use a split with labels"
                )


def closest(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown `name`: those of `known` that may have been meant, or nothing."""
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

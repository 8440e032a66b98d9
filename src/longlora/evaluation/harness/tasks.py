"""Names of benchmarks -> lm-evaluation-harness's tasks with their data, or one line that says what is missing.

Data comes from the local cache of `datasets`, from local files, or, where it is allowed, over the network. Remote code
is never run: datasets are data files, metric scripts of the Hub are refused.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlora.errors import DataError
from longlora.evaluation.harness.data import closest, first_line, local_data, require_answers

if TYPE_CHECKING:
    from lm_eval.api.task import Task

TaskSpec = str | Mapping[str, Any]
"""The name of a task, group or tag, or the settings of a task of one's own as lm-eval's YAML files have them."""

_LOCAL_HOSTS = (None, "", "localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class _Leaf:
    """One task before its data is loaded; functions in `config` are names unless it is a task of one's own."""

    name: str
    requested: str
    config: Mapping[str, Any]
    yaml_path: Path | None
    overrides: Mapping[str, Any]


def require_lm_eval() -> str:
    """The version of lm_eval.

    Raises:
        DataError: it is not installed, or a package it needs is not.
    """
    try:
        import lm_eval.evaluator
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        reason = "" if error.name == "lm_eval" else f" ({error})"
        raise DataError(f"lm-evaluation-harness is not installed{reason}: pip install 'longlora[bench]'") from error
    return version("lm_eval")


def load_tasks(
    specs: Sequence[TaskSpec],
    *,
    data: Mapping[str, Path] | None = None,
    num_fewshot: int | None = None,
    download: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> list[Task]:
    """The tasks that `specs` name, each once, with their data.

    Args:
        data: task -> a local file with the rows to evaluate on (.jsonl, .json, .parquet; columns as in the dataset),
            a folder with one such file for each split (train.jsonl, test.jsonl), or a copy of the dataset's
            repository; group -> such a copy, for all its tasks.
        num_fewshot: examples in front of each question, for tasks whose own number is not 0; None means their own.
        download: datasets that are not in the cache may come from the Hub.
        metadata: settings that some tasks read, such as ``{"max_seq_lengths": "8k"}`` of BABILong.

    Raises:
        DataError: lm_eval is missing, a task is unknown or not run here, or data is missing or has other columns.
    """
    require_lm_eval()
    data = dict(data or {})
    with libraries(download):
        names = [spec for spec in specs if isinstance(spec, str)]
        for name in names:
            _refuse_ruler(name, name)
        manager = _manager(bool(names))
        leaves: dict[str, _Leaf] = {}
        for spec in specs:
            for leaf in _leaves(manager, spec):
                _refuse(leaf)
                leaves.setdefault(leaf.name, leaf)
        known = {name for leaf in leaves.values() for name in (leaf.name, leaf.requested)}
        for name in data:
            if name not in known:
                raise DataError(f"--data {name}=...: {name} is not in --tasks{closest(name, sorted(known))}")
        asked = Counter(leaf.requested for leaf in leaves.values())
        built = []
        for leaf in leaves.values():
            changes = dict(leaf.overrides)
            if metadata:
                changes["metadata"] = {**(leaf.config.get("metadata") or {}), **metadata}
            path = data.get(leaf.name) or data.get(leaf.requested)
            if path is not None:
                shared = leaf.name not in data and asked[leaf.requested] > 1
                changes |= local_data(leaf.name, leaf.config, path, num_fewshot, shared=shared)
            built.append(_load(manager, leaf, changes, path, download))
        return built


@contextlib.contextmanager
def libraries(download: bool) -> Iterator[None]:
    """lm-eval without its chatter and, unless `download`, without a network: nothing can wait for an answer.

    Metric scripts of the Hub are code: they are not fetched in any case.
    """
    import datasets
    import evaluate
    import huggingface_hub.constants
    import lm_eval.api.task
    import lm_eval.evaluator

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        stack.callback(logger.setLevel, level)
        stack.enter_context(_replaced(evaluate.config, "HF_EVALUATE_OFFLINE", True))
        for survey in ("add_env_info", "get_git_commit_hash"):  # commands that are run after each call, for seconds
            if hasattr(lm_eval.evaluator, survey):
                stack.enter_context(_replaced(lm_eval.evaluator, survey, lambda *_: None))
        if not sys.stderr.isatty():
            stack.enter_context(_replaced(lm_eval.api.task, "tqdm", lambda rows, **_: rows))
        if not download:
            stack.enter_context(_replaced(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
            stack.enter_context(_replaced(datasets.config, "HF_HUB_OFFLINE", True))
            stack.enter_context(_replaced(socket, "getaddrinfo", _local_hosts_only(socket.getaddrinfo)))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _local_hosts_only(find: Any) -> Any:
    """Some tasks fetch files by themselves, and a machine without a network may leave them waiting."""

    def refuse(host: Any, *arguments: Any, **options: Any) -> Any:
        if host in _LOCAL_HOSTS:
            return find(host, *arguments, **options)
        raise OSError(f"{host} was asked for")

    return refuse


@functools.cache
def _manager(with_names: bool) -> Any:
    from lm_eval.tasks import TaskManager

    # Reading the index of all tasks takes seconds.
    return TaskManager(include_defaults=with_names)


def _leaves(manager: Any, spec: TaskSpec) -> Iterator[_Leaf]:
    if not isinstance(spec, str):
        yield _Leaf(str(spec["task"]), str(spec["task"]), spec, None, {})
    elif spec in manager.task_index:
        yield from _named(manager.task_index, spec, spec, {})
    else:
        close = closest(spec, manager.all_tasks)
        raise DataError(f"task {spec!r} is not known to lm-evaluation-harness{close or '; see `lm-eval ls tasks`'}")


def _named(index: Mapping[str, Any], name: str, requested: str, overrides: Mapping[str, Any]) -> Iterator[_Leaf]:
    entry = index[name]
    if entry.kind.name == "TAG":
        for member in sorted(entry.tags):
            yield from _named(index, member, requested, overrides)
    elif entry.kind.name == "GROUP":
        yield from _grouped(index, _full_config(entry.yaml_path, requested), requested, overrides)
    else:
        yield _Leaf(name, requested, {**entry.cfg, **overrides}, entry.yaml_path, overrides)


def _grouped(
    index: Mapping[str, Any], group: Mapping[str, Any], requested: str, overrides: Mapping[str, Any]
) -> Iterator[_Leaf]:
    """The tasks of a group, with what the group sets for all of them and for each."""
    from lm_eval.config.group import GroupConfig

    structure = {field.name for field in fields(GroupConfig)}
    common = {**{key: value for key, value in group.items() if key not in structure}, **overrides}
    members = group["task"]
    for member in [members] if isinstance(members, str) else members:
        own = {"task": member} if isinstance(member, str) else dict(member)
        key = "group" if "group" in own else "task"
        name = own[key]
        if name in index:
            yield from _named(index, name, requested, {**common, **{k: v for k, v in own.items() if k != key}})
        elif key == "group":
            yield from _grouped(index, own, requested, common)
        else:
            named = f"{group['group']}::{name}"
            yield _Leaf(named, requested, {**common, **own, "task": named}, None, {})


def _full_config(yaml_path: Path, requested: str) -> dict[str, Any]:
    """A YAML file of lm-eval with what it includes, its functions imported."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return load_yaml(yaml_path)
    except ImportError as error:
        raise _packages(requested, error) from error


def _refuse(leaf: _Leaf) -> None:
    _refuse_ruler(leaf.name, leaf.requested)
    if leaf.config.get("unsafe_code"):
        raise DataError(f"task {leaf.name} runs code that the model writes, which longlora does not: leave it out")
    if leaf.config.get("doc_to_image") or leaf.config.get("doc_to_audio"):
        raise DataError(f"task {leaf.name} needs images or sound, and longlora extends language models: leave it out")
    if any(metric.get("hf_evaluate") for metric in leaf.config.get("metric_list") or []):
        raise DataError(f"task {leaf.name} is scored by a script from the Hub, and remote code is off: leave it out")


def _refuse_ruler(name: str, requested: str) -> None:
    """lm-eval 0.4.13 builds some of these prompts in a loop that need not end, and scores the questions wrongly."""
    if name == "ruler" or name.startswith(("ruler_", "niah_")):
        raise DataError(
            f"task {requested} is RULER, whose prompts lm-evaluation-harness may never finish building: put ruler "
            "into eval.tasks of the recipe and run `longlora eval`"
        )


def _load(
    manager: Any,
    leaf: _Leaf,
    changes: Mapping[str, Any],
    path: Path | None,
    download: bool,
) -> Task:
    spec: TaskSpec = leaf.name
    if changes or leaf.yaml_path is None:
        full = _full_config(leaf.yaml_path, leaf.name) if leaf.yaml_path else leaf.config
        spec = {**full, **changes, "task": leaf.name}
    try:
        task: Task
        (task,) = manager.load([spec])["tasks"].values()
        if path is not None:
            require_answers(task, path)
    except DataError:
        raise
    except ImportError as error:
        raise _packages(leaf.name, error) from error
    except Exception as error:
        raise _unavailable(leaf, path, download, error) from error
    return task


def _packages(task: str, error: ImportError) -> DataError:
    extra = "longbench" if task.startswith("longbench") else "tasks"
    return DataError(
        f"task {task} needs packages that are not installed ({first_line(error)}): pip install 'lm-eval[{extra}]'"
    )


def _unavailable(leaf: _Leaf, path: Path | None, download: bool, error: Exception) -> DataError:
    import datasets

    name = leaf.config.get("dataset_name")
    source = f"{leaf.config.get('dataset_path') or 'its own'}{f' (config {name})' if name else ''}"
    reason = f"{type(error).__name__}: {first_line(error)}"
    if path is not None:
        return DataError(f"task {leaf.name} cannot use {path} ({reason}): it needs the columns of dataset {source}")
    own_file = "" if "class" in leaf.config else f"give --data {leaf.name}=FILE, or "
    copied = f"{own_file}copy the cache {datasets.config.HF_CACHE_HOME} of a machine that has it"
    remedy = f"check the network, {copied}" if download else f"the network is off; add --download, {copied}"
    return DataError(f"task {leaf.name} needs dataset {source}, which cannot be loaded ({reason}): {remedy}")

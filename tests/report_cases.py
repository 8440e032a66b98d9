"""Made-up evaluation files whose numbers can be checked by hand, and readers of the report made from them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from longlora.artifacts import RunFolder
from longlora.evaluation.report.compare import read_comparison
from longlora.evaluation.report.summary import Summary, summarize

OLD, NEW = 100, 200
# variant -> loss at OLD, loss at NEW and tail at NEW of the first document; the second lies 1 nat higher
LOSSES = {"base": (3.0, 5.0, 7.0), "rope_only": (3.2, 3.1, 3.05), "trained": (3.04, 2.9, 2.8)}
# log-probabilities of two keys at OLD and two at NEW
KEYS = {"base": (-0.1, -0.3, -8.0, -9.0), "rope_only": (-0.2, -0.4, -1.0, -1.4), "trained": (-0.3, -0.2, -0.5, -0.8)}


def perplexity(variant: str, documents: tuple[str, ...] = ("first", "second")) -> list[dict[str, Any]]:
    rows = []
    for index, document in enumerate(documents):
        at_old, at_new, tail = LOSSES[variant]
        # The second document is shorter at NEW, so that the weights matter.
        for length, tokens, loss in ((OLD, 99, at_old), (NEW, 199 if index == 0 else 149, at_new)):
            rows.append(
                {"document": document, "context_length": length, "stride": length, "protocol": "press"}
                | {"tokens": tokens, "loss": loss + index, "bytes": 4 * tokens}
                | {"tail_tokens": 20, "tail_loss": tail + index}
            )
    return rows


def positions(variant: str, documents: tuple[str, ...] = ("first", "second")) -> list[dict[str, Any]]:
    return [
        {"document": name, "start": start, "stop": start + 50, "tokens": 50 - (start == 0), "loss": loss}
        for name in documents
        for start, loss in zip(range(0, NEW, 50), (LOSSES[variant][0],) * 2 + (LOSSES[variant][2],) * 2, strict=True)
    ]


def prompt(task: str, length: int, depth: float | None = None, trial: int = 0, **changes: Any) -> dict[str, Any]:
    """A row of an answered prompt: right, unless `changes` say otherwise."""
    row = {"task": task, "name": task, "length": length, "depth": depth, "trial": trial, "document": None, "seed": 0}
    row |= {"tokens": length - 6, "references": ["48213"], "answer": "48213", "score": 1.0, "correct": True}
    row |= {"log_probability": None, "answer_tokens": 6, "prompt_sha256": f"{task}{length}{depth}{trial}"}
    return row | changes


def passkey(variant: str) -> list[dict[str, Any]]:
    return [
        prompt(
            "passkey", (OLD, OLD, NEW, NEW)[index], (0.1, 0.9)[index % 2], correct=value > -1.2, log_probability=value
        )
        for index, value in enumerate(KEYS[variant])
    ]


def ruler(scores: dict[str, dict[int, list[float]]]) -> list[dict[str, Any]]:
    """Rows from scores by RULER task and length, one for each prompt."""
    return [
        prompt("ruler", length, trial=trial, name=name, score=score, correct=score == 1)
        for name, by_length in scores.items()
        for length, values in by_length.items()
        for trial, score in enumerate(values)
    ]


def evaluation(variant: str, documents: tuple[str, ...] = ("first", "second"), **changes: Any) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    return {
        "schema": 2,
        "variant": variant,
        "model": "org/model",
        "weights": ("7e" if variant == "trained" else "0b") * 32,
        "tokenizer_hash": "1f" * 32,
        "original_context_length": OLD,
        "context_length": NEW,
        "covered_context_length": OLD if variant == "base" else NEW,
        "rope_parameters": rope if variant == "base" else {**rope, "rope_type": "yarn", "factor": 2.0},
        "attention": "full (sdpa)",
        "dtype": "bfloat16",
        "device": "a CPU, 2 threads",
        "versions": {"torch": "2.13.0", "peft": None},
        "commit": None,
        "date": "2026-11-23",
        "seed": 0,
        "bos": True,
        "seconds": 300.0,
        "peak_bytes": 3 * 2**30,
        "settings": {"variants": ["base", "rope_only", "trained"], "ruler": {"threshold": 80.0}},
        "perplexity": perplexity(variant, documents),
        "positions": positions(variant, documents),
        "longppl": [],
        "retrieval": passkey(variant),
        "cost": [],
        **changes,
    }


def benchmarks(of: dict[str, Any], rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """The file of standard benchmarks of the model whose evaluation is `of`."""
    same = {name: of[name] for name in ("variant", "weights", "rope_parameters", "dtype")}
    settings = {"max_length": of["covered_context_length"], "chat_template": False, "seed": 1234, "lm_eval": "0.4.13"}
    return {"schema": 1, **same, "settings": settings, "rows": rows, **changes}


def save(run: RunFolder, **evaluations: dict[str, Any]) -> RunFolder:
    """Write ``VARIANT.json``, and ``VARIANT.harness.json`` of rows under ``harness``."""
    for variant, value in evaluations.items():
        if rows := value.get("harness"):
            run.harness(variant).parent.mkdir(parents=True, exist_ok=True)
            run.harness(variant).write_text(json.dumps(benchmarks(value, rows)), encoding="utf-8")
        path = run.evaluation(variant)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value), encoding="utf-8")
    return run


def complete_run(root: Path, **changes: Any) -> RunFolder:
    """A run with all three variants, a training log and a recipe."""
    run = save(RunFolder(root), **{variant: evaluation(variant, **changes) for variant in LOSSES})
    lines = [json.dumps({"step": step, "loss": 3 - step / 100, "tokens": step * 10}) for step in range(1, 51)]
    run.metrics.write_text("\n".join(lines) + "\n", encoding="utf-8")
    run.recipe.write_text("run_dir: somewhere\nnote: '```'\n", encoding="utf-8")
    return run


class Reader(HTMLParser):
    """Tables as lists of rows of cell texts, ids, tag names, and all text; refuses tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link", "br", "wbr"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += (" " if self.open[-1] == "span" else "") + data


def read_html(run: RunFolder) -> Reader:
    reader = Reader()
    reader.feed(run.report_html.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Tables of GitHub-flavoured Markdown; every line of one must have as many cells as its header."""
    tables: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith("| "):
            inside = False
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not inside:
            tables.append([])
        inside = True
        tables[-1].append(cells)
        assert len(cells) == len(tables[-1][0]), line
    for table in tables:
        assert all(re.fullmatch(r"-{3,}:?", cell) for cell in table[1])
    return tables


def summary_of(*runs: RunFolder) -> Summary:
    """What a report says of `runs`."""
    return summarize(read_comparison(runs))

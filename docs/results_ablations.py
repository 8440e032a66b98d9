"""The section of results.md on what helps: rows of benchmarks/ablate.py, seed by seed beside full attention."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable

from results_rows import ROOT, Row, every, newest, origin, table

sys.path.insert(0, str(ROOT / "benchmarks"))
from ablation_variants import EXPERIMENTS, FULL_ATTENTION, Size, Variant

_SEEDS = range(10)
_TITLES = {
    "attention": "Attention in training",
    "retrieval": "Attention in training and retrieval, with yarn",
    "needle": "Retrieval of needles, with yarn",
    "trained": "What is trained",
    "rope": "RoPE",
    "rate": "Learning rate",
    "data": "Data mix, with yarn",
}


class Ablations:
    """Rows of one size by variant and seed."""

    def __init__(self, rows: list[Row], size: Size) -> None:
        self._by_settings, self._size = {row["settings"]: row for row in rows}, size

    def of(self, variant: Variant) -> dict[int, Row]:
        """Seed -> row."""
        found = {seed: self._by_settings.get(variant.identity(self._size, seed)) for seed in _SEEDS}
        return {seed: row for seed, row in found.items() if row is not None}

    def line(self, variant: Variant) -> dict[str, str]:
        """What every table says of a variant: title -> cell; empty if there is no row."""
        rows = self.of(variant)
        if not rows:
            return {}
        measured = {
            f"{name} {times}x": _spread(row[f"{name}_{times}x"] for row in rows.values())
            for name in ("loss", "passkey", "needle")
            for times in (1, 2, 4)
        }
        return {"": variant.name, "seeds": str(len(rows))} | measured

    def kept(self, variant: Variant, measure: str, untrained: Variant, full: Variant) -> str:
        """The part of the gain of `full` over `untrained`, which has one seed; in per cent, of `_pairs`."""
        before = self.of(untrained).get(0)
        parts = [
            (float(before[measure]) - float(row[measure])) / (float(before[measure]) - float(whole[measure]))
            for row, whole in self._pairs(variant, full)
            if before
        ]
        return _spread((str(100 * part) for part in parts), digits=0)

    def beside(self, variant: Variant, other: Variant, measure: str) -> str:
        """The difference to `other`, of what both have, of `_pairs`."""
        pairs = [(row[measure], whole[measure]) for row, whole in self._pairs(variant, other)]
        return _spread(str(float(one) - float(two)) for one, two in pairs if one and two)

    def _pairs(self, variant: Variant, other: Variant) -> list[tuple[Row, Row]]:
        """Rows of the same seed on the same device: bfloat16 on one and float32 on another differ by some per cent."""
        rows, others = self.of(variant), self.of(other)
        both = [(row, others[seed]) for seed, row in rows.items() if seed in others]
        return [(row, whole) for row, whole in both if row["device"] == whole["device"]]


def _spread(values: Iterable[str], digits: int = 3) -> str:
    """Mean and standard deviation over seeds; of what is there."""
    numbers = [float(value) for value in values if value]
    if not numbers:
        return ""
    mean = f"{statistics.mean(numbers):.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.{digits}f}"


def _full_attention(name: str, variant: Variant) -> Variant:
    """Full attention in the same table, at the rate of `variant`."""
    begin = f"{FULL_ATTENTION.name}, rate 1e-4" if ", rate 1e-4" in variant.name else FULL_ATTENTION.name
    return next(other for other in EXPERIMENTS[name] if other.name.startswith(begin))


def _more(found: Ablations, name: str, variant: Variant, of_full: dict[str, str]) -> dict[str, str]:
    """Columns that only some tables have: title -> cell."""
    right = _spread((row["correct_2x"] for row in found.of(variant).values()), digits=2)
    answered = {"part of passkeys found, 2x": right} if name in ("retrieval", "needle", "data") else {}
    if name not in ("attention", "retrieval", "needle"):
        return answered
    full = _full_attention(name, variant)
    kept = [found.kept(variant, loss, EXPERIMENTS[name][0], full) for loss in ("loss_1x", "loss_2x")]
    columns = {"% of full attention's gain kept, 1x": kept[0], "2x": kept[1]}
    if name == "attention":
        return columns | {"time of a step, full attention's = 1": of_full.get(variant.name, "")}
    beside = {measure: found.beside(variant, full, f"{measure}_2x") for measure in ("passkey", "needle")}
    return answered | columns | {f"{measure} 2x less full attention's": cell for measure, cell in beside.items()}


def _filled(rows: list[dict[str, str]]) -> str:
    """A table of the columns in which some row has something."""
    head = [title for title in rows[0] if not title or any(row[title] for row in rows)]
    return table(head, ([row[title] for title in head] for row in rows))


def _longest() -> tuple[list[Row], Size]:
    """The rows of the longest context, which say most; what is shorter stays in the file.

    Not of one device alone: loss and retrieval are no times.
    """
    measured = list({row["settings"]: row for row in every("ablations")}.values())
    context = max((int(row["context"]) for row in measured), default=0)
    rows = [row for row in measured if int(row["context"]) == context]
    return rows, Size(context, max((int(row["steps"]) for row in rows), default=0))


# What docs/choosing.md shows: a name for a reader, and the one of the variant.
_OVERVIEW = {
    "no sink tokens (the paper)": "S2, T/4, no sinks (paper)",
    "**4 sink tokens, groups of T/4**": "S2, T/4, 4 sinks",
    "the same without the shift": "no shift, T/4, 4 sinks",
    "the last 20 % of the steps full": "S2, T/4, 4 sinks, last 20% full",
    "every 4th layer full": "S2, T/4, 4 sinks, every 4th layer full",
    "groups of T/2": "S2, T/2, 4 sinks",
    "groups of T/8": "S2, T/8, 4 sinks",
    "a third of the rate": "S2, T/4, 4 sinks, rate 1e-4",
}


_YARN = (("retrieval", ", yarn"), ("needle", ", yarn, needles"))
# Its columns: title -> experiments with the end of the variant's name there, the first that has it counts; measure.
_COLUMNS = {
    "% kept, RoPE interpolated": ((("attention", ""),), "loss_1x"),
    "at 2x": ((("attention", ""),), "loss_2x"),
    "% kept, yarn": (_YARN, "loss_1x"),
    "at 2x, yarn": (_YARN, "loss_2x"),
    "passkey 2x less full attention's, yarn": (_YARN, "passkey_2x"),
    "needle, the same": (_YARN[1:], "needle_2x"),
}


def overview() -> str:
    """The table of docs/choosing.md: what each setting keeps of full attention."""
    found = Ablations(*_longest())
    lines = []
    for shown, name in _OVERVIEW.items():
        cells = {"": shown}
        for title, (experiments, measure) in _COLUMNS.items():
            beside = (_beside_full(found, f"{name}{suffix}", experiment, measure) for experiment, suffix in experiments)
            cells[title] = next(filter(None, beside), "")
        lines.append(cells)
    return _filled(lines)


def _beside_full(found: Ablations, name: str, experiment: str, measure: str) -> str:
    """The part of full attention's gain in a loss, or the difference to it in another measure; empty if unmeasured."""
    variant = next((variant for variant in EXPERIMENTS[experiment] if variant.name == name), None)
    if variant is None:
        return ""
    full = _full_attention(experiment, variant)
    if measure.startswith("loss"):
        return found.kept(variant, measure, EXPERIMENTS[experiment][0], full)
    return found.beside(variant, full, measure)


def ablations() -> list[str]:
    """The section; empty without rows."""
    rows, size = _longest()
    if not rows:
        return []
    context, found = size.context, Ablations(rows, size)
    command = f"attention retrieval needle trained rope rate data --context {size.context} --steps {size.steps}"
    parts = [
        "## What helps",
        f"`python benchmarks/ablate.py {command}`: SmolLM2-135M-Instruct, RoPE interpolated by 2 where "
        f"nothing else is said, {size.steps} steps "
        f"of one row of {size.context:,} tokens (State of the Union messages), constant rate. Loss (nats a token) and "
        "passkey (log-probability of four numbers hidden in each document, nats) with full attention, on two held-out "
        "documents, in their first 1, 2 and 4 rows; needle: the same of a sentence among two others like it, nine "
        "prompts a length over parts of the texts; mean ± standard deviation where there are several seeds. What "
        "stands beside full attention ran on the same device. No text is longer than the model's own 8,192 tokens. "
        f"In float32 on CPUs without products in bfloat16 (AVX2), else in bfloat16. {origin(rows)}.",
    ]
    steps = newest("patterns", "pattern", "context")
    of_full = {row["pattern"]: row["of_full_attention"] for row in steps if int(row["context"]) == context}
    for name, variants in EXPERIMENTS.items():
        lines = [line | _more(found, name, v, of_full) for v in variants if (line := found.line(v))]
        if not lines:
            continue
        parts += [f"### {_TITLES[name]}", _filled(lines)]
        if name == "attention" and of_full:
            parts += [
                f"Time: `python benchmarks/bench_patterns.py --contexts {context} --repeats "
                f"{steps[0]['repeats']}`: forward and backward pass of the "
                f"model's shape, median of interleaved passes in {steps[0]['dtype']}. {origin(steps)}. Longer "
                "rows: [a whole training step](#a-whole-training-step)."
            ]
    return parts

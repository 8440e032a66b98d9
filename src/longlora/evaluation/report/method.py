"""How the numbers were measured, in sentences, and on what, as tables.

In: `Comparison`. Out: sentences and `Table`.
"""

from __future__ import annotations

from collections.abc import Sequence

from longlora.evaluation.report.compare import Comparison
from longlora.evaluation.report.records import Evaluation, PerplexityRow
from longlora.evaluation.report.ruler_scores import thresholds
from longlora.evaluation.report.tables import Cell, Row, Table

_BY_MODEL = ("RoPE parameters", "RoPE covers", "weights")
_VARIANTS = {
    "base": "base is the model as it came",
    "rope_only": "RoPE only is the same weights with rescaled rotary position embeddings and no training",
    "trained": "trained is after training",
}
_SCORING = {
    "press": "press: windows begin at the start of a document; each token is scored once, in the first window that "
    "holds it, and a last window that would be short is moved back to be full",
    "longlora": "longlora: all positions of overlapping windows count, as in the paper's tables; a token is scored "
    "many times, so the number mixes short and long contexts",
    "truncate": "truncate: the first tokens of each document, in one window",
}


def how_measured(comparison: Comparison) -> tuple[str, ...]:
    """What a reader must know to judge the numbers, one sentence or two for each kind that was measured."""
    evaluations = [column.evaluation for column in comparison.columns]
    attention = ", ".join(sorted({item.attention for item in evaluations}))
    bos = {item.bos for item in evaluations}
    seeds = ", ".join(map(str, sorted({item.seed for item in evaluations})))
    lines = [
        f"{'; '.join(text for variant, text in _VARIANTS.items() if variant in {e.variant for e in evaluations})}.",
        f"Attention during all measurements: {attention}.",
        "A BOS token stands in front where the model's tokenizer puts one there: "
        f"{'yes' if bos == {True} else 'no' if bos == {False} else 'for some of the models'}.",
        f"Seed: {seeds}. Every prompt can be made again from its row, which holds the SHA-256 of its tokens.",
    ]
    lines += _losses([row for item in evaluations for row in item.perplexity])
    if any(item.positions for item in evaluations):
        lines.append("Loss by position comes from one forward pass over each document at the longest context.")
    lines += _longppl(evaluations) + _retrieval(evaluations) + _ruler(comparison) + _harness(evaluations)
    lines.append(
        "Intervals are 95 %: Wilson for shares and scores (too wide rather than too narrow where an answer can be "
        "partly right), Student t for means and for paired differences, and the normal approximation for standard "
        "benchmarks. They take prompts and documents as independent, count each document once, and are not corrected "
        "for looking at several lengths. Those of losses are in results.json."
    )
    return tuple(lines)


def _losses(rows: Sequence[PerplexityRow]) -> list[str]:
    if not rows:
        return []
    protocols = sorted({row.protocol for row in rows})
    strides = sorted({(row.context_length, row.stride) for row in rows})
    apart = "" if all(length == stride for length, stride in strides) else "; stride " + ", ".join(
        f"{stride} at {length} tokens" for length, stride in strides
    )  # fmt: skip
    disjoint = "" if apart else "; windows do not overlap"
    return [
        "Loss is the mean negative log-likelihood in nats per token; its exponential is the perplexity. Bits per byte "
        "is the same per byte of the scored text in UTF-8, and compares across tokenizers.",
        f"Protocol {'; '.join(_SCORING.get(name, name) for name in protocols)}{apart}{disjoint}.",
        "The last tokens of the new context are those at the end of each document's first window.",
        "Means over documents are weighted by scored tokens and cover the documents measured for all models.",
    ]


def _longppl(evaluations: Sequence[Evaluation]) -> list[str]:
    rows = [row for item in evaluations for row in item.longppl]
    settings = sorted({(row.evaluator, row.short_context, row.alpha, row.beta) for row in rows})
    return [
        f"LongPPL (Fang et al. 2024) is the perplexity on key tokens: those whose loss {evaluator} lowers by more than "
        f"{alpha:g} nats when it sees the whole text instead of the last {short} tokens, and to below {beta:g} nats."
        for evaluator, short, alpha, beta in settings
    ]


def _retrieval(evaluations: Sequence[Evaluation]) -> list[str]:
    found = {row.task for item in evaluations for row in item.retrieval}
    lines = []
    if "passkey" in found:
        keys = [row for item in evaluations for row in item.of_task("passkey")]
        places = [("filler text", any(not row.document for row in keys))]
        places += [("held-out documents", any(row.document for row in keys))]
        where = " and ".join(name for name, used in places if used)
        lines.append(
            f"Passkey: a key is hidden in {where} at a depth (0 % is the beginning, 100 % the end) and asked for at "
            "the end. The log-probability (nats) is that of the key as a whole, whatever was answered."
        )
        if places[1][1]:
            lines.append("Tokens of hidden keys stand in the documents but do not count for their loss.")
    if "needle" in found:
        lines.append(
            "Needle: sentences with a number each are hidden in real text; one is asked for, and its depth counts."
        )
    if "lines" in found:
        lines.append("Lines (LongEval, Li et al. 2023): the number in one of many numbered lines.")
    if "topics" in found:
        lines.append("Topics (LongEval, Li et al. 2023): the first topic of a long conversation.")
    if "questions" in found:
        lines.append(
            "Questions: held-out questions about documents in the chat template of the run, answered greedily; F1 over "
            "words and exact match as for SQuAD (Rajpurkar et al. 2016), of numbers in order the share of right places."
        )
    return lines


def _ruler(comparison: Comparison) -> list[str]:
    measured = [column for column in comparison.columns if column.evaluation.of_task("ruler")]
    if not measured:
        return []
    return [
        "RULER (Hsieh et al. 2024): synthetic tasks that need no data set, so not the two on question answering; "
        "scored by the references that an answer contains, from 0 to 100. The effective length is the longest "
        f"with an average of at least {thresholds(measured)}; the "
        "paper's 85.6 is Llama-2-7B-chat's average over 13 tasks at 4k."
    ]


def _harness(evaluations: Sequence[Evaluation]) -> list[str]:
    found = [item.benchmarks.settings for item in evaluations if item.benchmarks]
    if not found:
        return []
    versions = ", ".join(sorted({settings.lm_eval for settings in found if settings.lm_eval}))
    seeds = ", ".join(sorted({str(settings.seed) for settings in found if settings.seed is not None}))
    named = f" {versions}" if versions else ""
    seeded = f" Seed of its examples: {seeds}." if seeds else ""
    return [f"Standard benchmarks: lm-evaluation-harness{named}, with its own prompts and metrics.{seeded}"]


def environment_tables(comparison: Comparison) -> tuple[Table, ...]:
    """Facts that all models share, then those that differ."""
    facts = [_facts(column.evaluation) for column in comparison.columns]
    one = facts[0]
    alone = len(facts) == 1
    same = [name for name in one if len({item[name] for item in facts}) == 1 and (alone or name not in _BY_MODEL)]
    shared_rows = tuple(Row(name, (Cell(one[name]),)) for name in same)
    own_rows = tuple(Row(name, tuple(Cell(item[name]) for item in facts)) for name in one if name not in same)
    heading = comparison.labels[0] if alone else "all models"
    tables = [Table(("setting", heading), shared_rows, numeric=False, title="Environment")]
    if own_rows:
        tables.append(Table(("setting", *comparison.labels), own_rows, numeric=False, title="Environment by model"))
    return tuple(tables)


def _facts(item: Evaluation) -> dict[str, str]:
    rope = sorted((item.rope_parameters or {}).items(), key=lambda pair: (pair[0] != "rope_type", pair[0]))
    versions = ", ".join(f"{name} {version}" for name, version in item.versions.items() if version)
    return {
        "model": item.model,
        "weights": item.weights,
        "tokenizer hash": item.tokenizer_hash,
        "original context": f"{item.original_context_length} tokens",
        "new context": f"{item.context_length} tokens",
        "RoPE covers": f"{item.covered_context_length} tokens",
        "BOS in front": "yes" if item.bos else "no",
        "attention": item.attention,
        "dtype": item.dtype,
        "device": item.device,
        "versions": versions or "not recorded",
        "commit": item.commit or "not recorded",
        "date": item.date,
        "seed": str(item.seed),
        "RoPE parameters": ", ".join(f"{name}: {value}" for name, value in rope) or "none",
    }

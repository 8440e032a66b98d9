"""The report on runs: ``report.html``, ``report.md`` and ``results.json`` from whatever rows their folders hold.

In: `RunFolder` after ``longlora eval``. Out: the three files and the `Summary` they begin with. Read `records.py` for
what the rows are, `compare.py` for which models stand side by side, `summary.py` and `verdict.py` for what is made of
them, `page.py` and `render.py` for how it looks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from longlora.artifacts import RunFolder, write_atomic, write_json
from longlora.evaluation.report import curves
from longlora.evaluation.report.answers import TASK, answer_tables
from longlora.evaluation.report.compare import Comparison, Run, read_comparison
from longlora.evaluation.report.cost import cost_table, duration
from longlora.evaluation.report.documents import document_tables
from longlora.evaluation.report.markdown import to_markdown
from longlora.evaluation.report.method import environment_tables, how_measured
from longlora.evaluation.report.page import (
    Block,
    Bullets,
    Figures,
    Folded,
    Heading,
    Listing,
    Maps,
    Page,
    Paragraph,
    Section,
    Verdicts,
)
from longlora.evaluation.report.render import to_html
from longlora.evaluation.report.results import to_results
from longlora.evaluation.report.retrieval_maps import retrieval_maps
from longlora.evaluation.report.ruler_scores import ruler_scores, ruler_sentence, ruler_table
from longlora.evaluation.report.shared import kind_of, kinds_of, shared_positions
from longlora.evaluation.report.short_context import short_context_table
from longlora.evaluation.report.summary import Summary, perplexity_lengths, summarize
from longlora.evaluation.report.tables import BEYOND, count_text
from longlora.storage import without_home


def write_report(runs: Sequence[RunFolder], out: RunFolder | os.PathLike[str] | str) -> Summary:
    """Write ``report.html``, ``report.md`` and ``results.json`` on `runs` into `out`, each whole or not at all.

    Raises:
        RunFolderError: no folder, nothing was evaluated, or a file of rows is damaged; the message names the remedy.
    """
    folder = out if isinstance(out, RunFolder) else RunFolder(Path(out))
    comparison = read_comparison(runs)
    summary = summarize(comparison)
    page = Page(summary.title, summary.subtitle, _sections(comparison, summary))
    html, text, results = to_html(page), to_markdown(page), to_results(comparison, summary, page.sections)
    # A report is passed on: models and texts are named as they are, the user whose home they lie in is not.
    write_atomic(folder.report_html, without_home(html))
    write_atomic(folder.report_markdown, without_home(text))
    write_json(folder.results_json, json.loads(without_home(json.dumps(results, allow_nan=False, ensure_ascii=False))))
    return summary


def _sections(comparison: Comparison, summary: Summary) -> tuple[Section, ...]:
    """All sections that have something to show; those without rows are named where they would stand."""
    return (
        Section("Results", _results(summary)),
        Section("Verdict", _verdicts(comparison, summary)),
        Section("Loss by position", _positions(comparison)),
        Section("Perplexity by context length", _by_length(comparison)),
        Section("Passkey retrieval", _maps(comparison, "passkey", "Passkey retrieval")),
        Section("Needle in a haystack", _maps(comparison, "needle", "Needle in a haystack")),
        Section("Questions about documents", _questions(comparison)),
        Section("RULER", _ruler(comparison)),
        Section("Short context", _short_context(comparison)),
        Section("Loss by document", _documents(comparison)),
        Section("Training", _training(comparison)),
        Section("Cost of the evaluation", _cost(comparison)),
        Section("How it was measured", (Bullets(how_measured(comparison)),)),
        Section("Environment", environment_tables(comparison)),
        Section("Recipe", _recipes(comparison)),
    )


def _results(summary: Summary) -> tuple[Block, ...]:
    blocks: list[Block] = []
    if summary.missing:
        blocks.append(Paragraph(f"Not measured: {', '.join(summary.missing)}."))
    blocks += [Paragraph(note) for note in summary.notes]
    blocks.append(summary.table if summary.table.rows else Paragraph("The evaluation files hold no rows."))
    return tuple(blocks)


def _verdicts(comparison: Comparison, summary: Summary) -> tuple[Block, ...]:
    blocks: list[Block] = []
    for run in comparison.runs:
        items = tuple(verdict for verdict in summary.verdicts if verdict.run == run.name)
        if items and len(comparison.runs) > 1:
            blocks.append(Heading(run.name))
        if items:
            blocks.append(Verdicts(items))
    return tuple(blocks) or (Paragraph("No trained model was measured, so there is nothing to judge."),)


def _positions(comparison: Comparison) -> tuple[Block, ...]:
    svg = curves.loss_by_position(comparison)
    if svg is None:
        return (Paragraph("Loss by position was not measured, or not on the same documents."),)
    found = shared_positions(comparison.columns)
    documents = len({row.document for row in found.first})
    caption = (
        f"Mean loss over position, {count_text(documents, 'document')}, full window at the longest context. "
        "Each point is the mean of a range of positions, weighted by tokens."
    )
    if found.left_out:
        caption += f" Left out, because not measured for all models: {count_text(found.left_out, 'range')}."
    end = max(row.stop for row in found.first)
    beyond = [c for c in found.rows if c.mark(end)]
    if beyond:
        covered = "; ".join(f"{c.label} beyond {c.evaluation.covered_context_length}" for c in beyond)
        caption += f" Not covered by the model's RoPE: {covered}."
    if not comparison.one_tokenizer:
        caption += " The curves of models with different tokenizers do not compare: neither losses nor positions do."
    return (Figures((svg,), caption),)


def _by_length(comparison: Comparison) -> tuple[Block, ...]:
    svg = curves.perplexity_by_length(comparison)
    if svg is None:
        return (Paragraph("Fewer than two context lengths were measured for the same documents."),)
    measure = "Perplexity, on a logarithmic axis," if comparison.one_tokenizer else "Bits per byte"
    caption = f"{measure} by window size; the numbers are in the results above."
    return (Figures((svg,), caption + _hollow(comparison, perplexity_lengths(comparison))),)


def _hollow(comparison: Comparison, lengths: Sequence[int]) -> str:
    if not any(column.mark(length) for column in comparison.columns for length in lengths):
        return ""
    return " Hollow points lie beyond what the model's RoPE covers."


def _maps(comparison: Comparison, task: str, title: str) -> tuple[Block, ...]:
    kinds = kinds_of(comparison.columns, task)
    if not kinds:
        return (Paragraph(f"{title} was not measured."),)
    blocks: list[Block] = []
    for kind in kinds:
        blocks += [Heading(kind)] if len(kinds) > 1 else []
        blocks += _maps_of_kind(comparison, task, kind)
    return tuple(blocks)


def _maps_of_kind(comparison: Comparison, task: str, kind: str) -> list[Block]:
    maps = retrieval_maps(comparison, task, kind)
    if not maps:
        return [Paragraph("No prompt has a depth, so there is no map.")]
    cells = [cell for table in maps for row in table.rows for cell in row.cells]
    caption = (
        "Right answers by prompt length (tokens, across) and depth (down): right/prompts, the 95 % Wilson interval of "
        "the share"
    )
    caption += ", and the mean log-probability of the right answer (nats)" if any(c.below for c in cells) else ""
    caption += ". Colour is the share, from 0 (dark blue) to 1 (yellow). Each map shows all prompts of its model."
    caption += _hatched(any(cell.mark == BEYOND for cell in cells))
    asked = [row for column in comparison.columns for row in column.evaluation.of_task(task) if kind_of(row) == kind]
    if nowhere := sum(row.depth is None for row in asked):
        caption += f" Left out: {count_text(nowhere, 'prompt')} without a depth."
    blocks: list[Block] = [Maps(maps, caption)]
    svg = curves.log_probability_by_length(comparison, task, kind)
    if svg is not None:
        shown = (
            "Mean log-probability of the right answer over prompts that all models were asked, with 95 % t intervals."
        )
        blocks.append(Figures((svg,), shown + _hollow(comparison, [int(length) for length in maps[0].columns[1:]])))
    return blocks


def _hatched(any_beyond: bool) -> str:
    return f" Hatched and {BEYOND}: beyond what the model's RoPE covers." if any_beyond else ""


def _questions(comparison: Comparison) -> tuple[Block, ...]:
    tables = answer_tables(comparison)
    if not tables:
        return (Paragraph("Questions about documents were not asked."),)
    text = (
        "Exact match (right/questions) and F1 of greedy answers over questions that all models were asked, without "
        "case, punctuation and articles. Differences are paired; intervals are over questions, of which several are "
        "about one document."
    )
    shown = [block for table in tables for block in (Heading(table.title), table)]
    return (Paragraph(text), *shown, Heading("By length and depth"), *_maps_of_kind(comparison, TASK, ""))


def _ruler(comparison: Comparison) -> tuple[Block, ...]:
    scores = ruler_scores(comparison.columns)
    if not scores:
        return (Paragraph("RULER was not measured."),)
    maps = tuple(ruler_table(column, by_length) for column, by_length in scores.items())
    sentences = tuple(ruler_sentence(column, by_length) for column, by_length in scores.items())
    marked = any(column.mark(length) for column, by_length in scores.items() for length in by_length)
    caption = (
        "Score (0 to 100) by task and prompt length (tokens), its 95 % interval, and the prompts n it rests on, which "
        f"all models were asked. The average gives every task the same weight.{_hatched(marked)}"
    )
    return (Bullets(sentences), Maps(maps, caption))


def _short_context(comparison: Comparison) -> tuple[Block, ...]:
    table = short_context_table(comparison)
    if table is None:
        return (Paragraph("Nothing was measured at the original context for a model and for its base."),)
    text = (
        "Difference to the model as it came, with its 95 % interval: losses paired over documents, standard benchmarks "
        "taken as independent samples, which makes their interval rather too wide. Below 0 is better for a loss."
    )
    return (Paragraph(text), table)


def _documents(comparison: Comparison) -> tuple[Block, ...]:
    tables, left_out = document_tables(comparison)
    if not tables:
        return (Paragraph("Loss was not measured, or not on the same documents."),)
    blocks: list[Block] = [
        Paragraph("Loss in nats per token; below it, where measured, that of the last tokens."),
        *map(Folded, tables),
    ]
    if left_out:
        blocks.append(Paragraph(f"Left out, because not measured for all models: {', '.join(left_out)}."))
    return tuple(blocks)


def _training(comparison: Comparison) -> tuple[Block, ...]:
    svg = curves.training_curves(comparison.runs)
    if svg is None:
        return (Paragraph("metrics.jsonl is missing or holds no step with a finite loss."),)
    shown = [_training_text(run) for run in comparison.runs if run.training]
    if len(comparison.runs) > 1:
        shown = [
            f"{run.name}: {text}" for run, text in zip((r for r in comparison.runs if r.training), shown, strict=True)
        ]
    note = "Training loss is on training texts with the training attention and is not comparable with the losses above."
    return (Figures((svg,), f"{' '.join(shown)} {note}"),)


def _training_text(run: Run) -> str:
    first, last = run.training[0], run.training[-1]
    facts = [f"step {last.step}", f"loss {last.loss:.3f}"]
    if last.tokens is not None:
        facts.append(f"{last.tokens:,.0f} tokens")
    if last.seconds is not None:
        facts.append(duration(last.seconds))
    text = f"First logged step: step {first.step}, loss {first.loss:.3f}. Last: {', '.join(facts)}."
    if run.skipped_steps:
        text += f" Steps left out, as a loss or gradient was no number or nothing was predicted: {run.skipped_steps}."
    return text


def _cost(comparison: Comparison) -> tuple[Block, ...]:
    text = (
        "Seconds by task; tokens that went through the model, tokens taken over from a prefix that prompts share "
        "instead of being read again, and their share of both. Rows that an earlier call measured count in their task, "
        "not in the wall time."
    )
    if any(column.evaluation.benchmarks for column in comparison.columns):
        text += " Standard benchmarks are not in it."
    return (Paragraph(text), cost_table(comparison))


def _recipes(comparison: Comparison) -> tuple[Block, ...]:
    blocks: list[Block] = []
    several = len(comparison.runs) > 1
    for run in comparison.runs:
        of_run = f" of {run.name}" if several else ""
        if run.recipe:
            blocks.append(Listing(f"recipe.yaml{of_run}", run.recipe))
            continue
        evaluation = next(iter(run.columns.values())).evaluation
        blocks.append(Paragraph(f"recipe.yaml{of_run} is missing."))
        blocks.append(Listing(f"settings of eval{of_run}", json.dumps(evaluation.settings.model_dump(), indent=2)))
    return tuple(blocks)

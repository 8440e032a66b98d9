"""The report of a run: ``report.html`` and ``report.md`` from whatever rows the run folder holds.

In: a `RunFolder` after ``longlora eval``. Out: the two files and the `Summary` they begin with. Read `records.py` for
what the rows are, `summary.py` and `verdict.py` for what is made of them, `render.py` for how it looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from longlora.artifacts import RunFolder, write_atomic
from longlora.errors import RunFolderError
from longlora.evaluation import plots
from longlora.evaluation.records import (
    LABELS,
    VARIANTS,
    Evaluation,
    PerplexityRow,
    TrainingRow,
    read_evaluations,
    read_training,
    shared_perplexity,
    shared_positions,
)
from longlora.evaluation.render import (
    Block,
    Bullets,
    Figures,
    Listing,
    Page,
    Paragraph,
    Section,
    Verdicts,
    to_html,
    to_markdown,
)
from longlora.evaluation.summary import NOT_MEASURED, Cell, Row, Summary, Table, summarize, window_name


def write_report(run: RunFolder) -> Summary:
    """Write ``report.html`` and ``report.md`` of `run`, each whole or not at all.

    Raises:
        RunFolderError: nothing was evaluated, or a file of rows is damaged; the message names the remedy.
    """
    evaluations = read_evaluations(run)
    summary = summarize(evaluations)
    page = _page(summary, evaluations, read_training(run), _recipe(run))
    write_atomic(run.report_html, to_html(page))
    write_atomic(run.report_markdown, to_markdown(page))
    return summary


def _recipe(run: RunFolder) -> str | None:
    try:
        return run.recipe.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunFolderError(f"{run.recipe} cannot be read ({error}): repair it or remove it") from None


def _page(
    summary: Summary, evaluations: Mapping[str, Evaluation], training: Sequence[TrainingRow], recipe: str | None
) -> Page:
    measured = ", ".join(LABELS[name] for name in summary.measured)
    old, new = summary.original_context_length, summary.context_length
    sections = [
        Section("Results", _results(summary)),
        Section("Verdict", (Verdicts(summary.verdicts),)),
        Section("How it was measured", (Bullets(_protocol(evaluations)),)),
        Section("Loss by document", _by_document(evaluations)),
        Section("Loss by position", _position_plot(evaluations)),
        Section("Passkey retrieval", _passkey_plots(evaluations)),
        Section("Training", _training(training)),
        Section("Environment", _environment(evaluations)),
        Section("Recipe", (Listing("recipe.yaml", recipe) if recipe else Paragraph("recipe.yaml is missing."),)),
    ]
    return Page(summary.model, f"Context extended from {old} to {new} tokens. Measured: {measured}.", tuple(sections))


def _results(summary: Summary) -> tuple[Block, ...]:
    blocks: list[Block] = []
    if summary.missing:
        missing = ", ".join(f"{LABELS[name]} (eval/{name}.json)" for name in summary.missing)
        blocks.append(Paragraph(f"Not measured: {missing}."))
    blocks.append(summary.table if summary.table.rows else Paragraph("The evaluation files hold no rows."))
    return tuple(blocks)


def _protocol(evaluations: Mapping[str, Evaluation]) -> tuple[str, ...]:
    everything = [row for item in evaluations.values() for row in item.perplexity]
    attention = ", ".join(sorted({item.attention for item in evaluations.values()}))
    lines = [
        "base is the model as it came; RoPE only is the same weights with rescaled rotary position embeddings and no "
        "training; trained is after training.",
        f"Attention during all measurements: {attention}.",
    ]
    if everything:
        disjoint = all(row.stride == row.context_length for row in everything)
        windows = (
            "Windows begin at the start of a document and do not overlap (a last one that would be short is moved back "
            "to be full); each token is scored once"
            if disjoint
            else "Windows advance by their stride; each token is scored once, in the first window that holds it"
        )
        names = ", ".join(sorted({row.protocol for row in everything}))
        lines += [
            "Loss is the mean negative log-likelihood in nats per token; its exponential is the perplexity.",
            f"{windows} (protocol: {names}).",
            "The last tokens of the new context are those at the end of each document's first window.",
            "Means over documents are weighted by scored tokens and cover the documents measured for all variants.",
        ]
    if any(item.positions for item in evaluations.values()):
        lines.append("Loss by position comes from one forward pass over each document at the longest context.")
    keys = [row for item in evaluations.values() for row in item.passkey]
    if keys:
        where = "held-out documents" if all(row.document for row in keys) else "filler text"
        if any(row.document for row in keys) and not all(row.document for row in keys):
            where = "filler text and held-out documents"
        hidden_note = ["Tokens of hidden keys stand in the documents but do not count for their loss."] * (
            "held-out" in where
        )
        lines += [
            f"Passkey: a key is hidden in {where} at a depth (0 % is the beginning, 100 % the end) and asked for at "
            "the end. Correct counts greedy answers equal to the key; the log-probability (nats) is that of the key as "
            "a whole, whatever was answered.",
            *hidden_note,
            "Intervals are 95 %: Wilson for correct answers, Student t for means and for paired differences. They "
            "take keys and documents as independent, count each document once, and are not corrected for looking at "
            "several lengths.",
        ]
    return tuple(lines)


def _by_document(evaluations: Mapping[str, Evaluation]) -> tuple[Block, ...]:
    blocks: list[Block] = []
    for length in sorted({row.context_length for item in evaluations.values() for row in item.perplexity}):
        rows = shared_perplexity(evaluations, length)
        first = next(iter(rows.values()), [])
        if not first:
            blocks.append(Paragraph(f"{length} tokens: no document was measured for all variants."))
            continue
        title = window_name([row for item in rows.values() for row in item], length)
        columns = (title, "tokens", *LABELS.values(), "trained - base", "trained - RoPE only")
        blocks.append(Table(columns, tuple(_document_row(rows, index) for index in range(len(first)))))
        most = max(sum(row.context_length == length for row in item.perplexity) for item in evaluations.values())
        if most > len(first):
            blocks.append(Paragraph(f"Left out, because not measured for all variants: {most - len(first)}."))
    if not blocks:
        return (Paragraph("Loss was not measured."),)
    return (Paragraph("Loss in nats per token; below it, where measured, that of the last tokens."), *blocks)


def _document_row(rows: Mapping[str, list[PerplexityRow]], index: int) -> Row:
    """Losses of one document by variant, then trained minus base and trained minus RoPE only."""
    at = {variant: item[index] for variant, item in rows.items()}
    one = next(iter(at.values()))
    cells = [Cell(str(one.tokens), f"last {one.tail_tokens}" if one.has_tail else "", one.tokens)]
    for variant in VARIANTS:
        row = at.get(variant)
        cells.append(_loss(row.loss, row.tail_loss if row.has_tail else None) if row else NOT_MEASURED)
    for other in ("base", "rope_only"):
        if "trained" not in at or other not in at:
            cells.append(NOT_MEASURED)
            continue
        a, b = at["trained"], at[other]
        tail = a.tail_loss - b.tail_loss if a.tail_loss is not None and b.tail_loss is not None else None
        cells.append(_loss(a.loss - b.loss, tail, "+"))
    return Row(one.document, tuple(cells))


def _loss(loss: float, tail: float | None, sign: str = "") -> Cell:
    return Cell(f"{loss:{sign}.3f}", "" if tail is None else f"{tail:{sign}.3f}", loss)


def _position_plot(evaluations: Mapping[str, Evaluation]) -> tuple[Block, ...]:
    svg = plots.loss_by_position(evaluations)
    if svg is None:
        return (Paragraph("Loss by position was not measured."),)
    rows = next(iter(shared_positions(evaluations).values()))
    documents = len({row.document for row in rows})
    caption = (
        f"Mean loss over position, {documents} document{'s' * (documents != 1)}, full window at the longest context. "
        "Each point is the mean of a range of positions, weighted by tokens."
    )
    return (Figures((svg,), caption),)


def _passkey_plots(evaluations: Mapping[str, Evaluation]) -> tuple[Block, ...]:
    maps = [plots.passkey_heatmap(evaluations, variant) for variant in VARIANTS]
    by_length = plots.passkey_by_length(evaluations)
    shown = tuple(svg for svg in maps if svg is not None)
    if not shown:
        return (Paragraph("Passkey retrieval was not measured."),)
    blocks: list[Block] = [
        Figures(
            shown,
            "Correct answers by prompt length and depth: correct/keys, below it the mean log-probability of the key "
            "(nats). Colour is the fraction correct, from 0 (dark blue) to 1 (yellow).",
        )
    ]
    if by_length is not None:
        blocks.append(Figures((by_length,), "Mean log-probability of the key with 95 % t intervals over keys."))
    return tuple(blocks)


def _training(rows: Sequence[TrainingRow]) -> tuple[Block, ...]:
    svg = plots.training_curve(rows)
    if svg is None:
        return (Paragraph("metrics.jsonl is missing or holds no step with a finite loss."),)
    first, last = rows[0], rows[-1]
    facts = [f"step {last.step}", f"loss {last.loss:.3f}"]
    if last.tokens is not None:
        facts.append(f"{last.tokens:,.0f} tokens")
    if last.seconds is not None:
        facts.append(_duration(last.seconds))
    caption = (
        f"First logged step: step {first.step}, loss {first.loss:.3f}. Last: {', '.join(facts)}. Training loss is on "
        "training texts with the training attention and is not comparable with the losses above."
    )
    return (Figures((svg,), caption),)


def _environment(evaluations: Mapping[str, Evaluation]) -> tuple[Block, ...]:
    """Facts all measured variants share, then those that differ (RoPE, duration and perhaps more)."""
    facts = {variant: _facts(item) for variant, item in evaluations.items()}
    one = next(iter(facts.values()))
    same = [name for name in one if len({item[name] for item in facts.values()}) == 1 and name not in _BY_VARIANT]
    shared_rows = tuple(Row(name, (Cell(one[name]),)) for name in same)
    own_rows = tuple(
        Row(name, tuple(Cell(facts[variant][name]) if variant in facts else NOT_MEASURED for variant in VARIANTS))
        for name in one
        if name not in same
    )
    return (
        Table(("setting", "all variants"), shared_rows, numeric=False),
        Table(("setting", *LABELS.values()), own_rows, numeric=False),
    )


_BY_VARIANT = ("RoPE parameters", "duration")


def _facts(item: Evaluation) -> dict[str, str]:
    rope = sorted((item.rope_parameters or {}).items(), key=lambda pair: (pair[0] != "rope_type", pair[0]))
    versions = ", ".join(f"{name} {version}" for name, version in item.versions.items() if version)
    return {
        "model": item.model,
        "original context": f"{item.original_context_length} tokens",
        "new context": f"{item.context_length} tokens",
        "attention": item.attention,
        "dtype": item.dtype,
        "device": item.device,
        "versions": versions or "not recorded",
        "commit": item.commit or "not recorded",
        "date": item.date,
        "seed": str(item.seed),
        "RoPE parameters": ", ".join(f"{name}: {value}" for name, value in rope) or "none",
        "duration": _duration(item.seconds),
    }


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{seconds:.0f} s ({minutes:.0f} min)" if minutes < 120 else f"{seconds:.0f} s ({minutes / 60:.1f} h)"

"""The page of made-up rows: whole, escaped, self-contained, the same in HTML, Markdown and JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from growth import LARGER, LIMIT, growth
from report_cases import (
    LOSSES,
    NEW,
    OLD,
    complete_run,
    evaluation,
    markdown_tables,
    passkey,
    prompt,
    read_html,
    ruler,
    save,
)

from longlora.artifacts import RunFolder
from longlora.evaluation.report.compare import Comparison, read_comparison
from longlora.evaluation.report.summary import summarize
from longlora.evaluation.report.write import write_report

EVERYTHING: dict[str, Any] = {
    "longppl": [
        {"document": "first", "context_length": OLD, "short_context": 10, "tokens": 99, "key_tokens": 9, "loss": 1.0}
        | {"all_loss": 3.0, "evaluator": "org/model", "alpha": 2.0, "beta": 2.0}
    ],
    "retrieval": [
        *passkey("trained"),
        *(prompt("needle", length, depth) for length in (OLD, NEW) for depth in (0.0, 0.5, 1.0)),
        *(prompt("lines", NEW, trial / 7, trial, correct=trial > 2) for trial in range(5)),
        *(prompt("topics", NEW, None, trial) for trial in range(5)),
        *ruler({"vt": {OLD: [1.0, 0.5], NEW: [0.25, 0.0]}, "niah_single_1": {OLD: [1.0, 1.0], NEW: [0.0, 1.0]}}),
    ],
    "harness": [
        {"task": "arc_easy", "metric": "acc", "value": 0.5, "stderr": 0.02, "samples": 500, "num_fewshot": 0}
        | {"version": 1, "truncated": 3}
    ],
    "cost": [
        {"task": task, "seconds": 10.0, "prompts": 6, "tokens_read": 1000, "tokens_reused": 3000, "tokens_generated": 9}
        for task in ("passkey", "needle")
    ],
}


@pytest.fixture
def full(tmp_path: Path) -> RunFolder:
    """Every task measured."""
    return complete_run(tmp_path / "run", **EVERYTHING)


def test_main_table_is_the_same_in_the_terminal_html_markdown_and_json(full: RunFolder) -> None:
    table = write_report([full], full).table
    shown = [tuple(row) for row in table.strings()]
    in_html = read_html(full).tables[0]
    assert tuple(in_html[0]) == table.columns
    assert [tuple(row[1:]) for row in in_html[1:]] == [row[1:] for row in shown]
    assert all(line[0].startswith(row[0]) for line, row in zip(in_html[1:], shown, strict=True))
    in_markdown = markdown_tables(full.report_markdown.read_text(encoding="utf-8"))[0]
    assert [tuple(row[1:]) for row in in_markdown[2:]] == [row[1:] for row in shown]
    in_json = json.loads(full.results_json.read_text())["tables"][0]
    assert [row["label"] for row in in_json["rows"]] == [row[0] for row in shown]
    assert [cell["text"] for cell in in_json["rows"][0]["cells"]] == ["3.500", "3.700", "3.540"]


def test_html_and_markdown_hold_the_same_tables(full: RunFolder) -> None:
    write_report([full], full)
    html, text = read_html(full).tables, markdown_tables(full.report_markdown.read_text(encoding="utf-8"))
    tables = json.loads(full.results_json.read_text())["tables"]
    assert len(html) == len(text) == len(tables)
    for shown, marked, table in zip(html, text, tables, strict=True):
        assert [row[1:] for row in shown[1:]] == [row[1:] for row in marked[2:]]
        assert len(table["rows"]) == len(shown) - 1


def test_table_of_documents(complete: RunFolder) -> None:
    write_report([complete], complete)
    tables = read_html(complete).tables
    documents = next(table for table in tables if table[0][0] == "document" and table[1][1].startswith("199"))
    assert documents[2] == [
        "second", "149 last 20", "6.000† 8.000", "4.100 4.050", "3.900 3.800", "-2.100 -4.200", "-0.200 -0.250",
    ]  # fmt: skip


def test_map_of_keys_prints_count_interval_and_log_probability(complete: RunFolder) -> None:
    write_report([complete], complete)
    maps = [table for table in read_html(complete).tables if table[0][0] == "depth"]
    assert len(maps) == 3
    assert maps[0] == [
        ["depth", "100", "200"],
        ["10 %", "1/1 [0.21, 1.00] -0.10", "0/1† [0.00, 0.79] -8.00"],
        ["90 %", "1/1 [0.21, 1.00] -0.30", "0/1† [0.00, 0.79] -9.00"],
    ]
    page = complete.report_html.read_text(encoding="utf-8")
    assert page.count('class="hatched"') == 2
    # Right is the bright end of the scale with dark letters on it, wrong the dark end with white ones.
    assert "background-color: #fee838; color: #000000" in page
    assert "background-color: #00224e; color: #ffffff" in page


def test_depths_that_do_not_form_a_grid_fall_into_quarters(empty: RunFolder) -> None:
    rows = passkey("base")
    for row, depth in zip(rows, (0.1, 0.2, 0.05, 1.0), strict=True):
        row["depth"] = depth
    save(empty, base=evaluation("base", retrieval=rows))
    write_report([empty], empty)
    table = next(table for table in read_html(empty).tables if table[0][0] == "depth")
    assert [row[0] for row in table[1:]] == ["0-25 %", "25-50 %", "50-75 %", "75-100 %"]
    assert table[1][1] == "2/2 [0.34, 1.00] -0.20"
    assert table[2][1:] == ["-", "-"]


def test_each_kind_of_needle_has_its_maps(empty: RunFolder) -> None:
    rows = [
        prompt("needle", length, depth, name=kind, log_probability=-1.0)
        for kind in ("single", "chain")
        for length in (OLD, NEW)
        for depth in (0.0, 1.0)
    ]
    save(empty, base=evaluation("base", retrieval=rows), trained=evaluation("trained", retrieval=rows))
    write_report([empty], empty)
    reader = read_html(empty)
    assert len([table for table in reader.tables if table[0][0] == "depth"]) == 4
    assert len(reader.ids) == len(set(reader.ids))
    assert "### chain" in empty.report_markdown.read_text(encoding="utf-8")


def test_ruler_tables_state_n_interval_average_and_effective_length(full: RunFolder) -> None:
    write_report([full], full)
    tables = [table for table in read_html(full).tables if table[0][0] == "task" and table[0][1] == "100"]
    assert tables[-1] == [
        ["task", "100", "200"],
        ["vt", "75.0 [20, 97] n=2", "12.5 [1, 74] n=2"],
        ["niah_single_1", "100.0 [34, 100] n=2", "50.0 [9, 91] n=2"],
        ["average", "87.5 [40, 99] n=4", "31.2 [7, 74] n=4"],
    ]
    effective = "trained: effective length 100 tokens, at the threshold of 80 over 2 tasks; "
    # 87.5 and 31.25, the one or the other twice
    weighted = "average weighted towards long prompts 50.0, towards short ones 68.8."
    assert effective + weighted in read_html(full).text


def test_cost_says_what_shared_prefixes_saved(full: RunFolder) -> None:
    write_report([full], full)
    table = next(table for table in read_html(full).tables if table[1][0] == "passkey")
    assert table[1][1] == "10 s 1,000 read 3,000 reused 75% saved"
    assert table[3][:2] == ["all tasks", "20 s 2,000 read 6,000 reused 75% saved"]
    assert table[4][:2] == ["wall time of the last call", "300 s 5 min"]
    assert table[5][1] == "3.00 GiB"


def test_short_context_differences_with_their_intervals(full: RunFolder) -> None:
    write_report([full], full)
    table = next(table for table in read_html(full).tables if table[0] == ["measure", "RoPE only", "trained"])
    # The second document lies 1 nat higher in every model: paired, nothing is left of that.
    assert table[1][1:] == ["+0.200 [+0.200, +0.200]", "+0.040 [+0.040, +0.040]"]
    # 1.96 * sqrt(2) * 0.02 = 0.055
    assert table[2] == ["arc_easy: acc 0-shot, version 1, 500 samples, 3 prompts cut"] + ["+0.000 [-0.055, +0.055]"] * 2


def test_missing_variants_are_named_and_nothing_is_judged_without_them(empty: RunFolder) -> None:
    save(empty, rope_only=evaluation("rope_only"))
    summary = write_report([empty], empty)
    assert {verdict.status for verdict in summary.verdicts} == {"not measured"}
    assert "Not measured: base (eval/base.json), trained (eval/trained.json)." in read_html(empty).text
    assert summary.table.strings()[0] == ["loss, first 100 tokens (nats/token)", "3.700"]
    markdown_tables(empty.report_markdown.read_text(encoding="utf-8"))


def test_one_model_without_training_is_a_report_without_verdicts(empty: RunFolder) -> None:
    save(empty, base=evaluation("base", settings={"variants": ["base"]}, context_length=OLD))
    summary = write_report([empty], empty)
    assert summary.verdicts == ()
    assert summary.missing == ()
    assert summary.subtitle == "Context of 100 tokens. Measured: base."
    text = read_html(empty).text
    assert "base is the model as it came." in text
    assert "trained is after training" not in text
    save(empty, base=evaluation("base", settings={"variants": ["base"]}))
    assert write_report([empty], empty).subtitle == "Context of 100 tokens, asked up to 200. Measured: base."
    assert "nothing to judge" in read_html(empty).text


def test_empty_lists(complete: RunFolder) -> None:
    for variant in LOSSES:
        save(complete, **{variant: evaluation(variant, retrieval=[])})
    found = [verdict.status for verdict in write_report([complete], complete).verdicts]
    assert found == ["PASS", "PASS", "PASS", "not measured", "not measured"]
    assert "Passkey retrieval was not measured." in read_html(complete).text
    for variant in LOSSES:
        save(complete, **{variant: evaluation(variant, perplexity=[], positions=[], retrieval=[])})
    assert {verdict.status for verdict in write_report([complete], complete).verdicts} == {"not measured"}
    text = read_html(complete).text
    assert "The evaluation files hold no rows." in text
    assert "Loss by position was not measured" in text


def test_left_out_documents_are_counted(empty: RunFolder) -> None:
    save(empty, base=evaluation("base"), trained=evaluation("trained", ("second", "first", "third")))
    write_report([empty], empty)
    assert "Left out, because not measured for all models: 1 at 100 tokens, 3 at 200 tokens." in read_html(empty).text
    assert "2 documents, 198 tokens scored; 1 left out, not measured for all" in read_html(empty).text


HOSTILE = "<script>alert(1)</script>|`x`](javascript:1)\n\x00& \"quoted' $x$ ![i](http://e.example/i.png)"


def test_hostile_strings_are_shown_not_run(tmp_path: Path) -> None:
    hostile = {
        "model": HOSTILE, "device": HOSTILE, "dtype": HOSTILE, "attention": HOSTILE, "date": HOSTILE, "commit": HOSTILE,
        "versions": {HOSTILE: HOSTILE}, "rope_parameters": {HOSTILE: [HOSTILE]}, "tokenizer_hash": HOSTILE,
        "harness": [{**EVERYTHING["harness"][0], "task": HOSTILE, "metric": HOSTILE, "version": HOSTILE}],
        "cost": [{**EVERYTHING["cost"][0], "task": HOSTILE}],
        "longppl": [{**EVERYTHING["longppl"][0], "evaluator": HOSTILE, "document": HOSTILE}],
        "settings": {"variants": [], HOSTILE: HOSTILE},
    }  # fmt: skip
    run = RunFolder(tmp_path / "run <b>bold $x$ ")
    values = {variant: evaluation(variant, (HOSTILE, "second"), **hostile) for variant in LOSSES}
    for value in values.values():
        value["retrieval"] = [{**row, "document": HOSTILE, "name": HOSTILE} for row in EVERYTHING["retrieval"]]
        value["perplexity"] = [{**row, "protocol": HOSTILE} for row in value["perplexity"]]
    save(run, **values)
    run.recipe.write_bytes(b"</pre><script>alert(2)</script>\n```\n# heading \xff\n")
    other = save(RunFolder(tmp_path / "other"), trained=evaluation("trained", (HOSTILE, "second")))
    write_report([run, other], run)
    reader = read_html(run)
    assert not reader.tags & {"script", "img", "b"}
    assert reader.text.count("<script>alert(1)</script>") > 10
    text = run.report_markdown.read_text(encoding="utf-8")
    body, _, listing = text.partition("recipe.yaml of run &lt;b&gt;bold $x$:")
    assert "<script" not in body
    assert "](http" not in body
    assert "](javascript" not in body
    assert listing.strip().startswith("````\n</pre>")
    assert len(markdown_tables(body)) == len(reader.tables)
    assert "\x00" not in text + run.report_html.read_text(encoding="utf-8")


def test_lone_surrogates_do_not_stop_the_report(empty: RunFolder) -> None:
    save(empty, base=evaluation("base", rope_parameters={"rope_type": "\ud800"}))
    write_report([empty], empty)
    assert "rope_type: ?" in read_html(empty).text


def test_page_is_self_contained_with_unique_ids_and_no_nan(full: RunFolder) -> None:
    write_report([full], full)
    reader = read_html(full)
    page = full.report_html.read_text(encoding="utf-8")
    assert len(reader.ids) == len(set(reader.ids))
    assert all(address.startswith("#") and address[1:] in reader.ids for address in reader.addresses)
    assert not reader.tags & {"script", "link", "img", "iframe", "object"}
    assert "@import" not in page
    assert all(name in reader.ids for name in re.findall(r"url\(#([^)]*)\)", page))
    markdown = full.report_markdown.read_text(encoding="utf-8")
    assert not re.search(r"\b(nan|NaN|inf|None)\b", reader.text + markdown)
    assert "run_dir: somewhere" in reader.text


def test_every_figure_has_a_text_that_stands_for_it(full: RunFolder) -> None:
    write_report([full], full)
    page = full.report_html.read_text(encoding="utf-8")
    figures = re.findall(r"<svg[^>]*>\n<title>([^<]*)</title>", page)
    assert len(figures) == page.count("<svg") == page.count('role="img"') == 4
    assert "base: 3.00 around token 25, 7.00 around 175" in figures[0]
    assert len(re.findall(r"<table[^>]*aria-label=", page)) == page.count("<table")


def test_report_is_reproducible(full: RunFolder) -> None:
    files = (full.report_html, full.report_markdown, full.results_json)
    write_report([full], full)
    before = [path.read_bytes() for path in files]
    write_report([full], full)
    assert [path.read_bytes() for path in files] == before


def test_report_goes_where_it_is_asked_to(complete: RunFolder, tmp_path: Path) -> None:
    write_report([complete], tmp_path / "elsewhere")
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == [
        "report.html",
        "report.md",
        "results.json",
    ]
    assert not complete.report_html.exists()


def test_the_time_of_a_summary_grows_with_its_prompts(tmp_path: Path) -> None:
    def compared(prompts: int) -> Comparison:
        tasks = {name: {length: [1.0] * prompts for length in (50, 100, 150, 200)} for name in map(str, range(11))}
        needles = [prompt("needle", length, 0.5, trial) for length in (50, 100) for trial in range(prompts)]
        rows = [*ruler(tasks), *needles]
        run = RunFolder(tmp_path / str(prompts))
        save(run, **{variant: evaluation(variant, retrieval=rows) for variant in LOSSES})
        return read_comparison([run])

    comparisons = {prompts: compared(prompts) for prompts in (5, 5 * LARGER)}
    assert growth(lambda prompts: summarize(comparisons[prompts]), 5) < LIMIT


def test_the_home_folder_is_not_told(empty: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/jürgen")
    save(empty, base=evaluation("base", model="/home/jürgen/models/a"))
    empty.recipe.write_text("run_dir: /home/jürgen/run\ndata: {train: ['/home/jürgen/x.txt']}\n", encoding="utf-8")
    write_report([empty], empty)
    for path in (empty.report_html, empty.report_markdown, empty.results_json):
        text = path.read_text(encoding="utf-8")
        assert "/home/j" not in text, path.name
        assert "~/" in text, path.name

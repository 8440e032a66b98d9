"""The report of made-up rows: every number in it is checked against one computed here by hand."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from longlora.artifacts import RunFolder
from longlora.errors import RunFolderError
from longlora.evaluation import plots
from longlora.evaluation.records import read_evaluations, read_training, shared_perplexity
from longlora.evaluation.report import write_report

OLD, NEW = 100, 200
# variant -> loss at OLD, loss at NEW and tail at NEW of the first document; the second lies 1 nat higher
LOSSES = {"base": (3.0, 5.0, 7.0), "rope_only": (3.2, 3.1, 3.05), "trained": (3.04, 2.9, 2.8)}
# log-probabilities of two keys at OLD and two at NEW
KEYS = {"base": (-0.1, -0.3, -8.0, -9.0), "rope_only": (-0.2, -0.4, -1.0, -1.4), "trained": (-0.3, -0.2, -0.5, -0.8)}


def perplexity(variant: str, documents: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for index, document in enumerate(documents):
        at_old, at_new, tail = LOSSES[variant]
        # The second document is shorter at NEW, so that the weights matter.
        for length, tokens, loss in ((OLD, 99, at_old), (NEW, 199 if index == 0 else 149, at_new)):
            rows.append(
                {"document": document, "context_length": length, "stride": length, "protocol": "press"}
                | {"tokens": tokens, "loss": loss + index, "tail_tokens": 20, "tail_loss": tail + index}
            )
    return rows


def positions(variant: str, documents: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {"document": name, "start": start, "stop": start + 50, "tokens": 50 - (start == 0), "loss": loss}
        for name in documents
        for start, loss in zip(range(0, NEW, 50), (LOSSES[variant][0],) * 2 + (LOSSES[variant][2],) * 2, strict=True)
    ]


def passkey(variant: str) -> list[dict[str, Any]]:
    return [
        {"length": (OLD, OLD, NEW, NEW)[index], "depth": (0.1, 0.9)[index % 2], "trial": 0, "document": None}
        | {"name": "pass key", "key": "48213", "answer": "48213", "correct": value > -1.2}
        | {"log_probability": value, "tokens": 6}
        for index, value in enumerate(KEYS[variant])
    ]


def evaluation(variant: str, documents: tuple[str, ...] = ("first", "second"), **changes: Any) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    return {
        "schema": 1,
        "variant": variant,
        "model": "org/model",
        "original_context_length": OLD,
        "context_length": NEW,
        "rope_parameters": rope if variant == "base" else {**rope, "rope_type": "yarn", "factor": 2.0},
        "attention": "full (sdpa)",
        "dtype": "bfloat16",
        "device": "a CPU, 2 threads",
        "versions": {"torch": "2.13.0", "peft": None},
        "commit": None,
        "date": "2026-11-23",
        "seconds": 300.0,
        "seed": 0,
        "perplexity": perplexity(variant, documents),
        "positions": positions(variant, documents),
        "passkey": passkey(variant),
        **changes,
    }


def save(run: RunFolder, **evaluations: dict[str, Any]) -> RunFolder:
    for variant, value in evaluations.items():
        path = run.evaluation(variant)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value), encoding="utf-8")
    return run


@pytest.fixture
def empty(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def complete(empty: RunFolder) -> RunFolder:
    save(empty, **{variant: evaluation(variant) for variant in LOSSES})
    lines = [json.dumps({"step": step, "loss": 3 - step / 100, "tokens": step * 10}) for step in range(1, 51)]
    empty.metrics.write_text("\n".join(lines) + "\n", encoding="utf-8")
    empty.recipe.write_text("run_dir: somewhere\nnote: '```'\n", encoding="utf-8")
    return empty


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
        if tag not in ("meta", "link", "br"):
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


def statuses(run: RunFolder) -> list[str]:
    return [verdict.status for verdict in write_report(run).verdicts]


# At NEW the mean is weighted: (199 * first + 149 * (first + 1)) / 348 = first + 0.428.
EXPECTED = [
    ("loss, first 100 tokens (nats/token)", "3.500", "3.700", "3.540"),
    ("loss, first 200 tokens (nats/token)", "5.428", "3.528", "3.328"),
    ("loss, last 20 of 200 tokens (nats/token)", "7.500", "3.550", "3.300"),
    ("passkey, 100 tokens: correct", "2/2 [0.34, 1.00]", "2/2 [0.34, 1.00]", "2/2 [0.34, 1.00]"),
    # two values: mean +- 12.7062 * |difference| / 2
    (
        "passkey, 100 tokens: log-probability (nats)",
        "-0.20 [-1.47, 1.07]",
        "-0.30 [-1.57, 0.97]",
        "-0.25 [-0.89, 0.39]",
    ),
    ("passkey, 200 tokens: correct", "0/2 [0.00, 0.66]", "1/2 [0.09, 0.91]", "2/2 [0.34, 1.00]"),
    (
        "passkey, 200 tokens: log-probability (nats)",
        "-8.50 [-14.85, -2.15]",
        "-1.20 [-3.74, 1.34]",
        "-0.65 [-2.56, 1.26]",
    ),
]


def test_main_table_is_the_same_by_hand_in_the_terminal_html_and_markdown(complete: RunFolder) -> None:
    write_report(complete)
    table = write_report(complete).table
    assert table.columns == ("measure", "base", "RoPE only", "trained")
    assert [tuple(row) for row in table.strings()] == EXPECTED
    in_html = read_html(complete).tables[0]
    assert in_html[0] == ["measure", "base", "RoPE only", "trained"]
    assert [tuple(row[1:]) for row in in_html[1:]] == [row[1:] for row in EXPECTED]
    assert all(shown[0].startswith(row[0]) for shown, row in zip(in_html[1:], EXPECTED, strict=True))
    assert in_html[2][0].endswith("2 documents, 348 tokens scored")
    in_markdown = markdown_tables(complete.report_markdown.read_text(encoding="utf-8"))[0]
    assert [tuple(row[1:]) for row in in_markdown[2:]] == [row[1:] for row in EXPECTED]


def test_table_of_documents(complete: RunFolder) -> None:
    write_report(complete)
    documents = read_html(complete).tables[2]
    assert documents[0][0] == "first 200 tokens"
    assert documents[2] == [
        "second", "149 last 20", "6.000 8.000", "4.100 4.050", "3.900 3.800", "-2.100 -4.200", "-0.200 -0.250",
    ]  # fmt: skip
    in_markdown = markdown_tables(complete.report_markdown.read_text(encoding="utf-8"))
    assert len(in_markdown) == len(read_html(complete).tables)


def test_verdicts_pass_with_their_numbers(complete: RunFolder) -> None:
    # Two keys give a t interval 12.7 times wider than their spread; four alike give a narrow one.
    for variant, value in (("base", -8.0), ("rope_only", -1.0), ("trained", -0.9)):
        rows = [{**passkey(variant)[2], "trial": trial, "log_probability": value + trial / 100} for trial in range(4)]
        save(complete, **{variant: evaluation(variant, passkey=rows)})
    verdicts = write_report(complete).verdicts
    assert [verdict.status for verdict in verdicts] == ["PASS"] * 5
    assert "trained, last 20 of 200 tokens 3.300; base at 100 tokens 3.500" in verdicts[0].numbers[0]
    assert "difference +0.040 (limit +0.05)" in verdicts[1].numbers[0]
    assert "-0.160 [-0.160, -0.160] over documents; 2 of 2 documents lower" in verdicts[2].numbers[0]
    assert "-0.200 [-0.200, -0.200] over documents; 2 of 2 documents lower" in verdicts[2].numbers[1]
    assert verdicts[3].numbers == ("200 tokens: difference +7.10 [+7.10, +7.10] nats; 4 keys",)
    assert verdicts[4].numbers == ("200 tokens: difference +0.10 [+0.10, +0.10] nats; 4 keys",)
    assert read_html(complete).text.count("PASS") == 5


def test_verdicts_fail(empty: RunFolder) -> None:
    worse = evaluation("trained")
    for row in worse["perplexity"]:
        row["loss"] += 1.0
        row["tail_loss"] += 1.0
    for row in worse["passkey"]:
        row["log_probability"] -= 20 + row["depth"] / 100
    save(empty, base=evaluation("base"), rope_only=evaluation("rope_only"), trained=worse)
    assert statuses(empty) == ["FAIL"] * 5
    assert read_html(empty).text.count("FAIL") == 5


@pytest.mark.parametrize(("rise", "status"), [(0.1, "PASS"), (0.1001, "FAIL")])
def test_limit_of_the_tail_is_not_missed_by_rounding(empty: RunFolder, rise: float, status: str) -> None:
    trained = evaluation("trained", ("first",))
    trained["perplexity"][1]["tail_loss"] = 3.0 + rise
    save(empty, base=evaluation("base", ("first",)), trained=trained)
    assert statuses(empty)[0] == status


def test_one_worse_length_fails_the_retrieval_verdict(complete: RunFolder) -> None:
    rows = passkey("rope_only")
    for row, drop in zip(rows, (-0.1, -0.1, 0.5, 0.51), strict=True):
        row["log_probability"] -= drop
    save(complete, trained=evaluation("trained", passkey=rows))
    verdict = write_report(complete).verdicts[4]
    assert verdict.status == "FAIL"
    assert verdict.numbers[0] == "100 tokens: difference +0.10 [+0.10, +0.10] nats; 2 keys"
    assert "200 tokens: difference -0.51 [-0.57, -0.44]" in verdict.numbers[1]


def test_missing_variants_are_named_and_nothing_is_judged_without_them(empty: RunFolder) -> None:
    save(empty, rope_only=evaluation("rope_only"))
    summary = write_report(empty)
    assert summary.missing == ("base", "trained")
    assert {verdict.status for verdict in summary.verdicts} == {"not measured"}
    assert "Not measured: base (eval/base.json), trained (eval/trained.json)." in read_html(empty).text
    assert summary.table.strings()[0] == ["loss, first 100 tokens (nats/token)", "-", "3.700", "-"]
    markdown_tables(empty.report_markdown.read_text(encoding="utf-8"))


def test_empty_lists(complete: RunFolder) -> None:
    for variant in LOSSES:
        save(complete, **{variant: evaluation(variant, passkey=[])})
    assert statuses(complete) == ["PASS", "PASS", "PASS", "not measured", "not measured"]
    assert "Passkey retrieval was not measured." in read_html(complete).text
    for variant in LOSSES:
        save(complete, **{variant: evaluation(variant, perplexity=[], positions=[], passkey=[])})
    assert set(statuses(complete)) == {"not measured"}
    text = read_html(complete).text
    assert "The evaluation files hold no rows." in text
    assert "Loss by position was not measured." in text


def test_only_documents_of_all_variants_are_compared(empty: RunFolder) -> None:
    save(empty, base=evaluation("base"), trained=evaluation("trained", ("second", "first", "third")))
    rows = shared_perplexity(read_evaluations(empty), OLD)
    assert [row.document for row in rows["base"]] == [row.document for row in rows["trained"]] == ["first", "second"]
    write_report(empty)
    assert "Left out, because not measured for all variants: 1." in read_html(empty).text


def test_documents_of_one_name_are_paired_in_order(empty: RunFolder) -> None:
    save(empty, base=evaluation("base", ("same", "same")), trained=evaluation("trained", ("same", "same")))
    rows = shared_perplexity(read_evaluations(empty), OLD)
    assert [(a.loss, b.loss) for a, b in zip(rows["base"], rows["trained"], strict=True)] == [(3.0, 3.04), (4.0, 4.04)]


HOSTILE = "<script>alert(1)</script>|`x`](javascript:1)\n\x00& \"quoted' ![i](http://e.example/i.png)"


def test_hostile_strings_are_shown_not_run(empty: RunFolder) -> None:
    hostile = {
        "model": HOSTILE, "device": HOSTILE, "dtype": HOSTILE, "attention": HOSTILE, "date": HOSTILE, "commit": HOSTILE,
        "versions": {HOSTILE: HOSTILE}, "rope_parameters": {HOSTILE: [HOSTILE]},
    }  # fmt: skip
    values = {variant: evaluation(variant, (HOSTILE, "second"), **hostile) for variant in LOSSES}
    for value in values.values():
        value["passkey"] = [{**row, "document": HOSTILE, "name": HOSTILE} for row in value["passkey"]]
        value["perplexity"] = [{**row, "protocol": HOSTILE} for row in value["perplexity"]]
    save(empty, **values)
    empty.recipe.write_bytes(b"</pre><script>alert(2)</script>\n```\n# heading \xff\n")
    write_report(empty)
    reader = read_html(empty)
    assert "script" not in reader.tags
    assert "img" not in reader.tags
    assert reader.text.count("<script>alert(1)</script>") > 10
    text = empty.report_markdown.read_text(encoding="utf-8")
    body, listing = text.split("recipe.yaml:")
    assert "<script" not in body
    assert "](http" not in body
    assert "](javascript" not in body
    assert listing.strip().startswith("````\n</pre>")
    assert len(markdown_tables(body)) == len(reader.tables)
    assert "\x00" not in text + empty.report_html.read_text(encoding="utf-8")


def test_lone_surrogates_do_not_stop_the_report(empty: RunFolder) -> None:
    save(empty, base=evaluation("base", rope_parameters={"rope_type": "\ud800"}))
    write_report(empty)
    assert "rope_type: ?" in read_html(empty).text


def test_page_is_self_contained_with_unique_ids_and_no_nan(complete: RunFolder) -> None:
    write_report(complete)
    reader = read_html(complete)
    page = complete.report_html.read_text(encoding="utf-8")
    assert len(reader.ids) == len(set(reader.ids))
    assert all(address.startswith("#") and address[1:] in reader.ids for address in reader.addresses)
    assert not reader.tags & {"script", "link", "img", "iframe", "object"}
    assert "@import" not in page
    assert all(name in reader.ids for name in re.findall(r"url\(#([^)]*)\)", page))
    markdown = complete.report_markdown.read_text(encoding="utf-8")
    assert not re.search(r"\b(nan|NaN|inf|None)\b", reader.text + markdown)
    assert page.count("<svg") == 6
    assert "run_dir: somewhere" in reader.text


def test_report_is_reproducible(complete: RunFolder) -> None:
    write_report(complete)
    before = complete.report_html.read_bytes()
    write_report(complete)
    assert complete.report_html.read_bytes() == before


def test_plots_are_valid_xml_with_their_own_ids(complete: RunFolder) -> None:
    evaluations = read_evaluations(complete)
    made = [
        plots.loss_by_position(evaluations),
        *(plots.passkey_heatmap(evaluations, variant) for variant in LOSSES),
        plots.passkey_by_length(evaluations),
        plots.training_curve(read_training(complete)),
        plots.training_curve(read_training(complete)[:1], name="one"),
    ]
    ids: list[str] = []
    for svg in made:
        assert svg is not None
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.get("width") is None
        assert not list(root.iter("{http://www.w3.org/2000/svg}image"))
        ids += [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))


def test_heat_map_prints_cells_and_falls_back_to_quarters(empty: RunFolder) -> None:
    save(empty, base=evaluation("base"))
    grid = plots.passkey_heatmap(read_evaluations(empty), "base") or ""
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", grid)
    assert {"1/1", "0/1", "-8.00", "10 %", "90 %"} <= set(texts)
    rows = passkey("base")
    for row, depth in zip(rows, (0.1, 0.2, 0.05, 1.0), strict=True):
        row["depth"] = depth
    save(empty, base=evaluation("base", passkey=rows))
    quarters = plots.passkey_heatmap(read_evaluations(empty), "base") or ""
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", quarters)
    assert {"0-25 %", "75-100 %", "2/2", "-0.20", "-9.00"} <= set(texts)
    assert plots.passkey_heatmap(read_evaluations(empty), "trained") is None


def test_position_axis_is_logarithmic_for_growing_ranges(empty: RunFolder) -> None:
    edges = [0, 2, 4, 8, 16, 32, 64, 128]
    rows = [
        {"document": "first", "start": start, "stop": stop, "tokens": stop - start, "loss": 3.0}
        for start, stop in pairwise(edges)
    ]
    save(empty, base=evaluation("base", positions=rows))
    svg = plots.loss_by_position(read_evaluations(empty)) or ""
    assert {"8", "16", "32", "64", "128"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", svg))


def test_no_evaluation_names_the_remedy(empty: RunFolder) -> None:
    with pytest.raises(RunFolderError, match="run `longlora eval` first"):
        write_report(empty)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "is damaged"),
        (json.dumps(evaluation("base", schema=2)), "schema"),
        (json.dumps(evaluation("trained")), "holds variant 'trained'"),
        (json.dumps(evaluation("base")).replace('"loss": 3.0', '"loss": NaN', 1), "perplexity.0.loss"),
        (json.dumps(evaluation("base", perplexity=[{"document": "first"}])), "perplexity.0.context_length"),
        (json.dumps(evaluation("base", passkey=[{**passkey("base")[0], "depth": 2}])), "passkey.0.depth"),
    ],
)
def test_damaged_files_name_the_file_and_the_remedy(empty: RunFolder, text: str, message: str) -> None:
    save(empty, base={})
    empty.evaluation("base").write_text(text, encoding="utf-8")
    with pytest.raises(RunFolderError, match=rf"base\.json.*{re.escape(message)}.*run `longlora eval` again"):
        write_report(empty)
    assert not empty.report_html.exists()


def test_files_of_different_extensions_are_refused(empty: RunFolder) -> None:
    save(empty, base=evaluation("base"), trained=evaluation("trained", context_length=400))
    with pytest.raises(RunFolderError, match=r"mixes extensions \(100 -> 200, 100 -> 400\).*longlora eval"):
        write_report(empty)


def test_training_rows(empty: RunFolder) -> None:
    save(empty, base=evaluation("base"))
    assert read_training(empty) == []
    lines = ['{"step": 1, "loss": 3.0}', '{"step": 2, "loss": NaN}', '{"step": 3, "loss": 2.0}', '{"runtime": 5}']
    empty.metrics.write_text("\n".join([*lines, '{"step": 3, "loss": 1.5}', '{"step": 4, "lo']), encoding="utf-8")
    assert [(row.step, row.loss) for row in read_training(empty)] == [(1, 3.0), (3, 1.5)]
    empty.metrics.write_text("{broken\n" + lines[0] + "\n", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl line 1 is not JSON: remove that line"):
        write_report(empty)

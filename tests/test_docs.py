"""The documentation follows the code: links, generated pages, figures, and everything that paper_index.md names."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import figure_cells
import matplotlib
import pytest
import torch
from report_cases import complete_run, passkey, ruler

from longlora.attention.grouped import grouped_attention
from longlora.attention.pattern import S2Pattern, may_attend
from longlora.attention.rolled import rolled_attention
from longlora.evaluation.report.write import write_report

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SOURCE = ROOT / "src" / "longlora"
PAGES = [*sorted(DOCS.glob("*.md")), *(path for path in [ROOT / "README.md"] if path.exists())]
INDEX = (DOCS / "paper_index.md").read_text(encoding="utf-8")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(DOCS))  # where these scripts find one another
make_figures, make_cli, make_results = script("make_figures"), script("make_cli"), script("make_results")
results_model, results_rows = sys.modules["results_model"], sys.modules["results_rows"]
make_scale = script("make_scale")


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def headings(text: str) -> set[str]:
    """Anchors as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_no_figure_is_still_to_be_filled_in() -> None:
    for page in PAGES:
        assert not re.findall(r"FIGURE_[A-Z]+|TODO|TBD", page.read_text(encoding="utf-8")), page.name


def test_links_regex_finds_links_and_pictures() -> None:
    assert len(links(DOCS / "method.md")) >= 8


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_relative_links_and_pictures_resolve(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {link}"
        if anchor and path.suffix == ".md":
            assert anchor in headings(path.read_text(encoding="utf-8")), f"{page.name} links to {link}"


def test_every_figure_is_shown_somewhere() -> None:
    pictures = {Path(link) for page in PAGES for link in links(page) if link.endswith(".svg")}
    shown = {path.name for path in pictures if path.parent.name == make_figures.FIGURES.name}
    assert shown == {f"{name}.svg" for name in make_figures.PLOTS} == {p.name for p in make_figures.FIGURES.iterdir()}


def test_cli_page_is_what_the_command_line_says_now() -> None:
    """Help texts are compared letter by letter for the versions they were made with; others lay them out anew."""
    stored, made = (DOCS / "cli.md").read_text(encoding="utf-8"), make_cli.cli_markdown()
    if f"with {make_cli.tools()};" in stored:
        assert stored == made, "run `python docs/make_cli.py`"
    _, keys, stored_table = stored.partition("## Recipe keys")
    assert keys
    assert stored_table == made.partition("## Recipe keys")[2], "run `python docs/make_cli.py`"
    assert set(re.findall(r"### longlora (\S+)", stored)) == set(re.findall(r"### longlora (\S+)", made))


def test_cli_page_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = make_cli.help_texts()
    for name, value in {"COLUMNS": "40", "FORCE_COLOR": "1", "GITHUB_ACTIONS": "true", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert make_cli.help_texts() == usual
    assert "\x1b" not in "".join(usual.values())


@pytest.mark.parametrize("name", list(make_figures.PLOTS))
def test_figures_show_what_the_code_says_now(name: str) -> None:
    """Their data always; the SVG text only for the matplotlib that drew it, as every version writes it differently."""
    stored = (make_figures.FIGURES / f"{name}.svg").read_text(encoding="utf-8")
    assert make_figures.stored_digest(stored) == make_figures.data_digest(name), "run `make figures`"
    if f"Matplotlib v{matplotlib.__version__}," in stored:
        assert stored == make_figures.svg_text(name), "run `make figures`"
    assert len(stored) < 50_000


def seen(output_1THD: torch.Tensor) -> list[list[bool]]:
    """With equal scores and one-hot values an output row is positive exactly at the keys that were seen; last head."""
    return (output_1THD[0, :, -1] > 0).tolist()


def marked(rows: list[str]) -> list[list[bool]]:
    unseen = (figure_cells.FUTURE, figure_cells.UNSEEN)
    return [[letter not in unseen for letter in row] for row in rows]


def equal_scores(T: int, heads: int = 2) -> list[torch.Tensor]:
    values = torch.eye(T).expand(1, heads, T, T)
    return [torch.zeros_like(values), torch.zeros_like(values), values]


def test_drawn_matrices_are_those_of_the_attention_functions() -> None:
    q, k, v = equal_scores(16)
    assert marked(figure_cells.rolled_cells(16, 4)) == seen(rolled_attention(q, k, v, group_size=4))
    for sinks in (0, 1):
        output = grouped_attention(q, k, v, [[0, 16]], S2Pattern(4, sinks))
        assert marked(figure_cells.pattern_cells(16, 4, sinks, shifted=True)) == seen(output)
    output = grouped_attention(*equal_scores(22), [[0, 10, 13, 22]], S2Pattern(4, 1))
    assert marked(figure_cells.packed_cells((10, 3, 9), 4, 1, shifted=True)) == seen(output)


def test_leak_lies_above_the_diagonal_and_is_the_only_difference() -> None:
    rolled, ours = (panel.rows for panel in make_figures.leak_panels())
    leaks = {(query, key) for query, row in enumerate(rolled) for key, letter in enumerate(row) if letter == "x"}
    # Groups of 4: the first half group sees the last half group.
    assert leaks == {(query, key) for query in (0, 1) for key in (14, 15)}
    assert [row.replace("x", " ") for row in rolled] == ours
    assert not any("x" in row for row in ours)


def test_cost_is_that_of_the_papers_table_11() -> None:
    for tokens, full, sparse in make_figures.PAPER_TABLE_11:
        assert make_figures.attention_operations(tokens, tokens) == pytest.approx(full, rel=2e-3)
        assert make_figures.attention_operations(tokens, tokens // 4) == pytest.approx(sparse, rel=5e-3)
    # Projections and MLP at 8,192 tokens.
    assert make_figures.linear_operations(8192) == pytest.approx(35.2 + 70.9, rel=2e-3)


@pytest.mark.parametrize("group_size", [4, 6])
def test_information_goes_half_a_group_further_back_with_every_layer(group_size: int) -> None:
    """method.md says so; without the shift it never leaves the group."""
    length, pattern = 36, S2Pattern(group_size)
    for halves, moves in (((False, True), True), ((False,), False)):
        layer = torch.tensor(
            [
                [any(may_attend(i, j, length, pattern, shifted=shifted) for shifted in halves) for j in range(length)]
                for i in range(length)
            ]
        )
        reached = torch.eye(length, dtype=torch.bool)
        for layers in range(1, 5):
            reached = (layer.float() @ reached.float()) > 0
            farthest = reached.float().argmax(1)
            least = torch.arange(length) - layers * group_size // 2
            assert bool((farthest <= least.clamp(min=0)).all()) is moves


def test_index_names_only_what_exists() -> None:
    spans = re.findall(r"`([^`\n]+)`", INDEX)
    files = [span for span in spans if re.fullmatch(r"[\w./-]+\.(py|yaml)", span)]
    tests = [span for span in spans if "::" in span]
    assert len(files) > 20
    assert len(tests) > 20
    for name in files:
        base = ROOT if name.startswith(("docs/", "tests/")) else SOURCE
        assert (base / name).is_file(), name
    for name in tests:
        path, *parts = name.split("::")
        body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        for part in parts:
            found = [n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part]
            assert found, name
            body = found[0].body


def test_index_states_the_defaults_of_the_recipe() -> None:
    fields = {key: field for key, _, field in make_cli.recipe_keys()}
    stated = re.findall(r"`([a-z_0-9.]+)` = `([^`]+)`", INDEX)
    assert len(stated) > 25
    for key, value in stated:
        assert fields[key].get_default(call_default_factory=True) == json.loads(value), key


def test_differences_name_only_files_that_exist() -> None:
    text = (DOCS / "differences.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:[a-z]\w*/)*[\w.-]+\.(?:py|yaml))`", text)
    # Scripts of the original code that the text speaks about.
    theirs = {"eval.py", "zero_to_fp32.py"}
    ours = [name for name in named if name not in theirs]
    assert len(ours) > 20
    for name in ours:
        assert ((ROOT if name.startswith("docs/") else SOURCE) / name).is_file(), name


def test_evaluation_section_says_what_was_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_rows, "ROWS", tmp_path)
    monkeypatch.setattr(results_model, "EVALUATION", tmp_path / "nothing.json")
    text = "\n".join(results_model.evaluation())
    assert "evaluation" in headings(text)
    assert text.count("Not measured: ") == 2


def test_evaluation_section_shows_a_report_and_where_it_is_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = [{"task": "passkey", "seconds": 10.0, "tokens_read": 1000, "tokens_reused": 3000}]
    run = complete_run(tmp_path, cost=cost, retrieval=[*passkey("base"), *ruler({"vt": {100: [1.0, 0.5]}})])
    write_report([run], run)
    monkeypatch.setattr(results_model, "EVALUATION", run.results_json)
    text = "\n\n".join(results_model.evaluation())
    assert "| loss, first 200 tokens (nats/token) (2 documents, 348 tokens scored) | 5.428† | 3.528 | 3.328 |" in text
    assert "| passkey, 200 tokens: correct (2 keys) | 0/2† [0.00, 0.66] | 0/2 [0.00, 0.66] | 0/2 [0.00, 0.66] |" in text
    assert "| RULER, 100 tokens: average (0 to 100) (1 task, 2 prompts) | 75.0 [20, 97] |" in text
    assert "| passkey | 10 s, 1,000 read, 3,000 reused, 75% saved |" in text
    assert "[example_report.md](example_report.md). org/model, attention full (sdpa), bfloat16, seed 0, a CPU" in text
    assert "base: 100 tokens" in text


def test_results_are_those_of_the_committed_rows() -> None:
    for path, text in make_results.pages().items():
        assert path.read_text(encoding="utf-8") == text, "run `python docs/make_results.py`"
    drawn = {path.name: path.read_text(encoding="utf-8") for path in make_results.pictures()}
    steps = results_rows.newest("train_step", "shape", "variant", "context")
    assert all(f"{int(row['context']) // 1024}k" in drawn["train_step.svg"] for row in steps)
    assert len(drawn) >= 3


# Planning all of them takes minutes.
QUICK = ("llama-2-7b_8k_8xa100", "llama-2-70b_32k-nf4_8xa100")


def test_scale_page_has_a_row_for_every_recipe_of_gpus() -> None:
    rows = make_scale.stored("recipes").splitlines()[2:]
    assert [re.findall(r"\[([^\]]+)\]", row)[0] for row in rows] == [row.name for row in make_scale.recipe_rows()]
    assert len(make_scale.stored("scale").splitlines()) == 2 + len(make_scale.POINTS)


@pytest.mark.parametrize("name", QUICK)
def test_scale_page_says_what_the_planner_says_now(name: str) -> None:
    assert make_scale.recipe_row(make_scale.Row(name)) in make_scale.stored("recipes"), (
        "run `python docs/make_scale.py`"
    )


@pytest.mark.parametrize("part", ["traffic", "measured"])
def test_scale_page_shows_the_traffic_of_the_code_now(part: str) -> None:
    made = {"traffic": make_scale.traffic_block, "measured": make_scale.measured_block}[part]()
    assert make_scale.stored(part) == made, f"run `python docs/make_scale.py {part}`"


@pytest.mark.slow
def test_scale_page_is_the_whole_plan_of_now() -> None:
    assert make_scale.stored("recipes") == make_scale.recipes_block(make_scale.recipe_rows())
    assert make_scale.stored("scale") == make_scale.scale_block(make_scale.POINTS)

"""What the documentation tells people to type is understood: commands, recipes and Python blocks.

Command lines are parsed by the real application and not run; overrides and recipes are checked by the recipe itself.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from longlora.cli.app import app
from longlora.config import Recipe
from longlora.config.recipe import build_recipe
from longlora.errors import RecipeError

ROOT = Path(__file__).parent.parent
# cli.md and example_report.md are generated; log.md is dated: its commands were those of their day.
NOT_TYPED = {"cli.md", "example_report.md", "log.md"}
PAGES = [
    *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in NOT_TYPED),
    *(path for name in ("README.md", "examples/README.md", "benchmarks/README.md") if (path := ROOT / name).exists()),
]
LEAST: dict[str, Any] = {"run_dir": "run", "model": {"name_or_path": "model"}, "context": {"context_length": 32768}}
COMMAND = typer.main.get_command(app)
SEPARATORS = {"&&", "||", "|", ";", ">", ">>", "2>", "&"}


def blocks(text: str, *languages: str) -> list[str]:
    """Code blocks of these languages; "" is a block that names none."""
    found = re.findall(r"^ *```([\w-]*)[^\n]*\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    return [body for language, body in found if language in languages]


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE))


def command_lines(text: str) -> list[list[str]]:
    """The words behind each ``longlora`` of a code block; comments, prompts and other programs are passed over."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if not re.search(r"(?<![\w/.'\"-])longlora ", line):
            continue
        command: list[str] | None = None
        for word in shlex.split(line.removeprefix("$ "), comments=True):
            if word == "longlora":
                assert command is None, f"two commands and nothing between them: {line}"
                command = []
                found.append(command)
            elif word in SEPARATORS:
                command = None
            elif command is not None:
                command.append(word)
    return found


def parsed(words: list[str]) -> dict[str, Any]:
    """What the application takes `words` for.

    Raises:
        AssertionError: it does not understand them.
    """
    command, name, rest = COMMAND, "longlora", words
    try:
        while True:
            context = command.make_context(name, list(rest))
            if not hasattr(command, "resolve_command"):
                return dict(context.params)
            name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    except typer.Exit:  # --help, --version
        return {}
    except Exception as error:  # one of the parser's own kinds, which typer keeps to itself
        raise AssertionError(f"longlora {shlex.join(words)}: {error.__class__.__name__}: {error}") from error


def check_overrides(values: list[str] | None) -> None:
    build_recipe(LEAST, [value for value in values or [] if value not in ("KEY=VALUE", "[KEY=VALUE]...")])


def check_recipe(values: dict[str, Any]) -> None:
    """A recipe, or a part of one."""
    parts = {key: values.get(key, {}) for key in ("model", "context")}
    build_recipe({**LEAST, **values, **{key: LEAST[key] | part for key, part in parts.items()}})


def verb_options(words: list[str]) -> tuple[list[str], set[str]]:
    """The verb that a phrase such as ``longlora plan --fit`` names, and the options that it has."""
    command, verb = COMMAND, []
    for word in words:
        if word not in getattr(command, "commands", {}):
            break
        command = command.commands[word]
        verb.append(word)
    names = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return verb, names | {"--help"}


def check_phrase(phrase: str) -> None:
    """An inline phrase may leave arguments out; its verb and options exist."""
    words = phrase.split()[1:]
    verb, options = verb_options(words)
    assert verb or words[0].startswith(("-", "VERB")), f"`{phrase}` names no verb"
    used = {word.partition("=")[0] for word in words if word.startswith("-") and len(word) > 1}
    assert used <= options, f"`{phrase}`: {' '.join(verb)} has no {', '.join(sorted(used - options))}"


def check_python(body: str) -> None:
    """It compiles, its imports resolve, and what it names of longlora exists."""
    tree = ast.parse(body)
    compile(tree, "block", "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert importlib.util.find_spec(alias.name), alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert importlib.util.find_spec(node.module), node.module
            if node.module.partition(".")[0] == "longlora":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "longlora":
            assert hasattr(importlib.import_module("longlora"), node.attr), f"longlora.{node.attr}"


def yaml_recipes(text: str) -> list[dict[str, Any]]:
    """Blocks that are recipes or parts of one: mappings whose keys are all sections of a recipe."""
    found = []
    for body in blocks(text, "yaml", ""):
        try:
            values = yaml.safe_load(body)
        except yaml.YAMLError:
            continue
        if isinstance(values, dict) and values.keys() & Recipe.model_fields.keys():
            found.append(values)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_of_the_page_are_understood(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for body in blocks(text, "", "bash", "sh", "console", "shell"):
        for words in command_lines(body):
            check_overrides(parsed(words).get("overrides"))
    for phrase in spans(text):
        if phrase.startswith("longlora "):
            check_phrase(phrase)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_recipes_and_python_of_the_page_are_understood(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for values in yaml_recipes(text):
        check_recipe(values)
    for body in blocks(text, "python"):
        check_python(body)
    for name in re.findall(r"(?<![\w/])recipes/([\w.-]+\.yaml)", text):
        assert (ROOT / "recipes" / name).is_file(), f"{page.name} names recipes/{name}"


def test_there_is_something_to_check() -> None:
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    assert sum(len(command_lines(body)) for text in texts for body in blocks(text, "", "bash", "console")) > 20
    assert sum(len(yaml_recipes(text)) for text in texts) >= 2
    assert any(blocks(text, "python") for text in texts)


def test_lines_with_comments_continuations_and_pipes() -> None:
    text = "$ pip install x && longlora plan my.yaml  # longlora nothing\ncat a | longlora ask m - \\\n  'why?' > b\n"
    assert command_lines(text) == [["plan", "my.yaml"], ["ask", "m", "-", "why?"]]
    assert command_lines("longlora: 3 tokens\npip install 'longlora[demo]'\n") == []
    assert parsed(["plan", "my.yaml", "train.steps=2"])["overrides"] == ["train.steps=2"]
    assert str(parsed(["eval", "my.yaml"])["recipe"]) == "my.yaml"


@pytest.mark.parametrize(
    "line", ["nosuchverb a", "plan", "plan my.yaml --nosuch", "plan my.yaml --gpus many", "eval model", "data nosuch"]
)
def test_a_wrong_command_is_found(line: str) -> None:
    with pytest.raises(AssertionError, match=f"longlora {line}"):
        parsed(line.split())


@pytest.mark.parametrize("override", ["train.stepz=2", "train.steps=many", "nosuch.key=1"])
def test_a_wrong_override_is_found(override: str) -> None:
    with pytest.raises(RecipeError):
        check_overrides(parsed(["train", "my.yaml", override])["overrides"])


@pytest.mark.parametrize("phrase", ["longlora nosuchverb", "longlora plan --nosuch", "longlora data nosuch --replace"])
def test_a_wrong_phrase_is_found(phrase: str) -> None:
    with pytest.raises(AssertionError, match="longlora"):
        check_phrase(phrase)


@pytest.mark.parametrize(
    "body", ["import no_such_module", "from longlora import nothing", "import longlora\nlonglora.nothing(1)"]
)
def test_a_wrong_python_block_is_found(body: str) -> None:
    with pytest.raises(AssertionError, match="no"):
        check_python(body)


def test_a_wrong_recipe_block_is_found() -> None:
    (values,) = yaml_recipes("```\ntrain: {stepz: 2}\n```\n")
    with pytest.raises(RecipeError, match="stepz"):
        check_recipe(values)

"""Write docs/cli.md from the command line and the recipe as they are: ``python docs/make_cli.py``.

Help texts come from the real application, run in another process with a fixed terminal: typer reads width and colours
from the environment when it is imported. Types, limits and defaults come from config/'s models; what a key means is the
string below its field there, read from the source, because pydantic does not keep it.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from longlora import config

CLI = Path(__file__).parent / "cli.md"
_CONFIG = Path(config.__file__).parent
_WIDTH = 100
# Variables that make typer or rich colour, widen or rearrange what they print.
_TERMINAL = ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TERMINAL_WIDTH", "CLICOLOR_FORCE", "TTY_COMPATIBLE")
_PROGRAM = """
import json
import typer.main
from typer.testing import CliRunner
from longlora.cli.app import app
def walk(command, path):
    for name, child in getattr(command, "commands", {}).items():
        yield [*path, name]
        yield from walk(child, [*path, name])
run = CliRunner().invoke
verbs = walk(typer.main.get_command(app), [])
print(json.dumps({" ".join(verb): run(app, [*verb, "--help"], prog_name="longlora").output for verb in verbs}))
"""
_LIMITS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}"}
_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false"}
_PLURALS = {int: "integers", float: "numbers", str: "texts"}


def help_texts() -> dict[str, str]:
    """Verb -> what ``longlora VERB --help`` prints on a terminal of 100 columns without colours."""
    environment = {key: value for key, value in os.environ.items() if key not in _TERMINAL}
    environment |= {"COLUMNS": str(_WIDTH), "NO_COLOR": "1", "TERM": "dumb", "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}
    # The same longlora as in this process, also where it is only on sys.path.
    environment["PYTHONPATH"] = os.pathsep.join([str(_CONFIG.parent.parent), *filter(None, sys.path)])
    made = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, encoding="utf-8", check=True
    )
    texts: dict[str, str] = json.loads(made.stdout)
    return {verb: _trimmed(text) for verb, text in texts.items()}


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")


def descriptions() -> dict[tuple[str, str], str]:
    """(class, field) -> the string below the field in config/; a field without one is missing."""
    found = {}
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(_CONFIG.glob("*.py"))]
    for node in (node for tree in trees for node in tree.body):
        if not isinstance(node, ast.ClassDef):
            continue
        for before, after in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(before, ast.AnnAssign)
                and isinstance(before.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                found[node.name, before.target.id] = " ".join(after.value.value.split())
    return found


def recipe_keys(
    section: type[BaseModel] = config.Recipe, prefix: str = ""
) -> Iterator[tuple[str, type[BaseModel], FieldInfo]]:
    """Dotted name, class and field of every setting, in the order of the classes."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from recipe_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, section, field


def kind(annotation: Any) -> str:
    """A type in words, for example ``integer or null``."""
    if annotation in _WORDS:
        return _WORDS[annotation]
    if annotation is type(None):
        return "null"
    inside = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in inside)
    if get_origin(annotation) is Annotated:
        return kind(inside[0])
    if get_origin(annotation) is list:
        item = get_args(inside[0])[0] if get_origin(inside[0]) is Annotated else inside[0]
        return f"list of {_PLURALS.get(item) or kind(item)}"
    if get_origin(annotation) in (Union, types.UnionType):
        return ", or ".join(kind(each) for each in inside)
    raise TypeError(f"no words for {annotation}")


def limits(field: FieldInfo) -> str:
    """For example ``> 0, < 1``; empty where every value of the type will do."""
    return ", ".join(
        form.format(getattr(constraint, name))
        for constraint in field.metadata
        for name, form in _LIMITS.items()
        if hasattr(constraint, name)
    )


def default(field: FieldInfo) -> str:
    """The default as it is written in YAML, or ``required``."""
    if field.is_required():
        return "required"
    return f"`{json.dumps(field.get_default(call_default_factory=True))}`"


def tools() -> str:
    """The libraries that lay the help texts out; other versions of them do it differently."""
    return f"typer {version('typer')} and rich {version('rich')}"


def cli_markdown() -> str:
    """The whole of docs/cli.md."""
    lines = [
        f"<!-- Generated by docs/make_cli.py with {tools()}; do not edit. -->",
        "# Command line and recipe keys",
        "",
        "What `longlora VERB --help` prints, and every key of a recipe. A verb exits with 0 when it did what was",
        "asked, with 2 for a mistake in the command, the recipe or the files, and with 130 after Ctrl-C; `check` exits",
        "with 1 when a check failed.",
        "",
        "## Verbs",
        "",
    ]
    for verb, text in help_texts().items():
        lines += [f"### longlora {verb}", "", "```text", text, "```", ""]
    lines += [
        "## Recipe keys",
        "",
        "A recipe is one YAML file with these keys; an unknown key is an error. `KEY=VALUE` arguments after the recipe",
        "override it under the dotted name, for example `train.steps=20`. Values are YAML: `null`, `[0.1, 0.9]`.",
    ]
    meanings = descriptions()
    rows: dict[type[BaseModel], list[str]] = {}
    for key, section, field in recipe_keys():
        meaning = _plain(meanings.get((section.__name__, key.rpartition(".")[2])))
        words = ", ".join(filter(None, [kind(field.annotation), limits(field)]))
        if section not in rows:
            rows[section] = ["", f"### {key.rpartition('.')[0] or 'top level'}", "", _plain(section.__doc__), ""]
            rows[section] += ["| key | type | default | meaning |", "|---|---|---|---|"]
        rows[section].append(f"| `{key}` | {words} | {default(field)} | {meaning} |")
    return "\n".join([*lines, *(line for table in rows.values() for line in table)]) + "\n"


def _plain(text: str | None) -> str:
    """A docstring as one line of Markdown."""
    return re.sub(r"``(.+?)``", r"`\1`", " ".join((text or "").split())).replace("|", r"\|")


if __name__ == "__main__":
    CLI.write_text(cli_markdown(), encoding="utf-8")
    print(f"{CLI}: {CLI.stat().st_size:,} bytes")

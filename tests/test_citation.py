"""CITATION.cff is the file that citation tools read, and says what the package says of itself."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import longlora

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def citation() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_required_keys_of_the_format_are_there(citation: dict[str, Any]) -> None:
    """Citation File Format 1.2.0, section "Required keys", and those of its references and authors."""
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"]
    assert citation["title"]
    (paper,) = citation["references"]
    assert {"authors", "title", "type"} <= set(paper)
    for author in (*citation["authors"], *paper["authors"]):
        assert set(author) in ({"name"}, {"family-names", "given-names"})


def test_version_and_licence_are_those_of_the_package(citation: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == longlora.__version__
    assert citation["license"] == project["license"]


def test_the_paper_is_cited(citation: dict[str, Any]) -> None:
    (paper,) = citation["references"]
    assert paper["url"].endswith("2309.12307")
    assert [author["family-names"] for author in paper["authors"]] == [
        "Chen", "Qian", "Tang", "Lai", "Liu", "Han", "Jia",
    ]  # fmt: skip

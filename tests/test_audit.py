"""The audit of what is pinned: how pip-audit's answers are read, and that every dependency has one exact version."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / ".ci" / "audit.py"
BUILD = {"pip", "setuptools", "wheel"}  # come with Python's own virtual environments


@pytest.fixture
def audit() -> ModuleType:
    if not SCRIPT.is_file():
        pytest.skip("an sdist has no .ci/")
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, **more}


WHOLE = [package("a", version="1", vulns=[]), package("b", version="2", vulns=[])]
WEAK = [*WHOLE, package("c", version="3", vulns=[{"id": "PYSEC-2026-1"}, {"id": "CVE-2026-2"}])]
UNKNOWN = package("d", skip_reason="Dependency not found on PyPI and could not be audited: d (4)")
REFUSED = "Traceback (most recent call last):\n  File x\nrequests.exceptions.ProxyError: HTTPSConnectionPool(...)"
ANSWERS = [
    (WHOLE, "", 0, 0, "no known weakness in 2 packages"),
    (WEAK, "", 1, 1, "known weaknesses in 1 packages: c 3: PYSEC-2026-1, CVE-2026-2"),
    ([*WEAK, UNKNOWN], "", 1, 1, "known weaknesses in 1 packages"),
    ([UNKNOWN], "No known vulnerabilities found", 2, 0, "answers for none of the 1 packages"),
    ([*WHOLE, UNKNOWN], "No known vulnerabilities found", 2, 2, "not audited: 1 of 3 packages, .* does not know: d"),
    ([], "", 2, 2, "no package is named in constraints.txt"),
    (None, REFUSED, 2, 0, r"cannot be reached from here \(ProxyError\)"),
    (None, "requests.exceptions.ReadTimeout: x", 2, 0, r"cannot be reached from here \(ReadTimeout\)"),
    (None, "/usr/bin/python: No module named pip_audit", 2, 2, "failed .*No module named pip_audit.* pip install"),
    (None, "", 2, 2, r"failed \(no message\)"),
    (7, "", 2, 2, "failed"),
]


@pytest.mark.parametrize(("packages", "errors", "status", "offline_status", "line"), ANSWERS)
def test_how_an_audit_ends(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], packages: Any, errors: str,
    status: int, offline_status: int, line: str,
) -> None:  # fmt: skip
    output = "" if packages is None else json.dumps({"dependencies": packages, "fixes": []})
    commands: list[list[str]] = []

    def run(command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, output, errors)

    monkeypatch.setattr(audit.subprocess, "run", run)
    for arguments, expected in ((["--offline-is-fine"], offline_status), ([], status)):
        assert audit.main(arguments) == expected
        assert re.search(line, capsys.readouterr().out)
    assert str(ROOT / "constraints.txt") in commands[0]
    assert {"--no-deps", "--disable-pip"} <= set(commands[0])  # nothing is installed or resolved


def test_a_service_that_never_answers(audit: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(audit.subprocess, "run", run)
    assert [audit.main(["--offline-is-fine"]), audit.main([])] == [0, 2]


def test_the_makefile_audits_and_does_not_excuse_an_unreachable_service() -> None:
    if not SCRIPT.is_file():
        pytest.skip("an sdist has no .ci/")
    target = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\naudit:\n")[2].split("\n\n")[0]
    assert target.strip() == "python .ci/audit.py"


def pins() -> dict[str, str]:
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([0-9][0-9A-Za-z.!]*)", line)
        assert match, f"constraints.txt pins nothing exactly, or from elsewhere, in {line!r}"
        name = canonicalize_name(match[1])
        assert name not in found, f"constraints.txt names {name} twice"
        found[name] = match[2]
    return found


def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


def required() -> list[Requirement]:
    """Every requirement of the package and of its extras; extras that name other extras are theirs."""
    values = project()
    lines = [*values["build-system"]["requires"], *values["project"]["dependencies"]]
    lines += [line for extra in values["project"]["optional-dependencies"].values() for line in extra]
    return [requirement for requirement in map(Requirement, lines) if requirement.name != "longlora"]


def test_whatever_the_package_asks_for_has_one_exact_version_that_it_allows() -> None:
    versions = pins()
    for requirement in required():
        assert not requirement.url, f"{requirement.name} comes from an address of its own"
        name = canonicalize_name(requirement.name)
        assert name in versions, f"constraints.txt lacks {name}: pip takes whatever is newest"
        assert requirement.specifier.contains(versions[name], prereleases=True), (str(requirement), versions[name])


def test_dependencies_of_dependencies_are_pinned_as_well() -> None:
    """As far as they are installed here: metadata alone says what a package asks for."""
    versions, waiting, seen, lacking = pins(), required(), set(), set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        key = name, frozenset(requirement.extras)
        if key in seen or name in BUILD or name.startswith(("nvidia-", "cuda-", "triton")):
            continue  # those of torch for GPUs differ from build to build
        seen.add(key)
        try:
            asked = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        if name not in versions:
            lacking.add(name)
        for line in map(Requirement, asked):
            if line.marker is None or any(
                line.marker.evaluate({"extra": extra}) for extra in (*requirement.extras, "")
            ):
                waiting.append(line)
    assert not lacking, f"constraints.txt lacks {', '.join(sorted(lacking))}, which dependencies need"
    assert len(seen) > 40, f"{sys.executable} has too few packages for this to say anything"

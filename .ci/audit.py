"""Whether a pinned package has a known weakness: pip-audit over constraints.txt, and one line that says how it ended.

    python .ci/audit.py [--offline-is-fine]

pip-audit ends with 0 and "No known vulnerabilities found" also where its service knows none of the packages, as behind
a mirror that lacks it. So packages are counted: only those the service answered for were audited.

Exit status: 0 all audited, none weak; 1 a known weakness; 2 not all audited (the service cannot be reached, it does
not know a package, or pip-audit failed). With --offline-is-fine a service that cannot be reached gives 0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
_LIMIT_SECONDS = 600
_SHOWN = 10
# Errors of requests and urllib3, as the last line of pip-audit's traceback names them.
_UNREACHABLE = ("ConnectionError", "ProxyError", "SSLError", "Timeout", "MaxRetryError", "NameResolutionError")


def main(arguments: list[str] | None = None) -> int:
    """Run pip-audit, print what it found, and return the exit status."""
    parser = argparse.ArgumentParser(description="Audit constraints.txt for known weaknesses.")
    parser.add_argument("--offline-is-fine", action="store_true", help="end with 0 where the service is out of reach")
    fine = parser.parse_args(arguments).offline_is_fine
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--requirement", str(CONSTRAINTS)]
    command += ["--format", "json", "--progress-spinner", "off", "--timeout", "15"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return _say(0 if fine else 2, f"not audited: the service gave no answer within {_LIMIT_SECONDS} s")
    status, line = verdict(done.stdout, done.stderr)
    return _say(0 if fine and status == 3 else min(status, 2), line)


def verdict(output: str, errors: str) -> tuple[int, str]:
    """Exit status (3: the service is out of reach) and the line for a person, from what pip-audit wrote."""
    try:
        packages = json.loads(output)["dependencies"]
        weak = [
            f"{package['name']} {package['version']}: {', '.join(found['id'] for found in package['vulns'])}"
            for package in packages
            if package.get("vulns")
        ]
        unknown = [package["name"] for package in packages if "vulns" not in package]
    except (ValueError, LookupError, TypeError, AttributeError):
        return _failed(errors)
    if not packages:
        return 2, f"not audited: no package is named in {CONSTRAINTS.name}"
    if weak:
        return 1, f"known weaknesses in {len(weak)} packages: {'; '.join(weak)}"
    if len(unknown) == len(packages):
        return 3, f"not audited: the service answers for none of the {len(packages)} packages from here"
    if unknown:
        names = ", ".join(unknown[:_SHOWN]) + (", ..." if len(unknown) > _SHOWN else "")
        return 2, f"not audited: {len(unknown)} of {len(packages)} packages, which the service does not know: {names}"
    return 0, f"no known weakness in {len(packages)} packages"


def _failed(errors: str) -> tuple[int, str]:
    last = (errors.strip().splitlines() or ["no message"])[-1]
    kind = last.partition(":")[0].rpartition(".")[2]
    if kind.endswith(_UNREACHABLE):
        return 3, f"not audited: the service cannot be reached from here ({kind})"
    return 2, f"not audited: pip-audit failed ({last[:200]}): pip install -c constraints.txt -e '.[dev]'"


def _say(status: int, line: str) -> int:
    print(f"audit: {line}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())

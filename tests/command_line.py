"""What the fixture `longlora` of conftest.py gives back."""

from typing import NamedTuple


class Result(NamedTuple):
    """One call of the command."""

    returncode: int
    stdout: str
    stderr: str

"""The ``longlora`` command: its verbs, and how errors reach a person.

A `LongLoraError` is one line on stderr and exit code 2; Ctrl-C is one line and exit code 130; a traceback is
a bug of ours. Of several processes that `torchrun` started, one speaks (`longlora.training.failures`).
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
import warnings
from typing import Annotated

import typer

from longlora import __version__
from longlora.cli import bench, check, data, export, measure, plan, prepare, quickstart, train, use
from longlora.errors import InterruptedRunError, LongLoraError, RecipeError
from longlora.memory.allocator import keep_freed_memory, use_huge_pages
from longlora.storage import is_disk_full
from longlora.training.distributed import read_ranks
from longlora.training.failures import report

_INTERRUPTED = 130
_NO_ACCESS = (errno.EROFS, errno.EACCES, errno.EPERM)
_UNFIT_PATH = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _module in (quickstart, plan, data, prepare, train, measure, use, export, check, bench):
    _module.add_to(app)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"longlora {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Teach a causal language model a longer context with shifted sparse attention (LongLoRA)."""


def main() -> None:
    """Entry point of the ``longlora`` command."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    _quiet_libraries()
    _show_choices()
    use_huge_pages()
    keep_freed_memory()
    try:
        _require_verb_for_several()
        app()
    except InterruptedRunError as error:
        _fail(str(error), error.exit_code, error)
    except LongLoraError as error:
        _fail(str(error), 2, error)
    except SystemExit as stopped:
        if stopped.code != _INTERRUPTED:  # typer's way to say Ctrl-C
            raise
        message = (
            "interrupted; whatever was finished is whole: `longlora resume` goes on with a training run, and the same "
            "`longlora eval` with a measurement"
        )
        _fail(message, _INTERRUPTED, stopped)
    except OSError as error:
        line = _fault_of_the_place(error)
        if line is None:
            _report_bug(error)
            raise
        _fail(line, 2, error)
    except Exception as error:
        _report_bug(error)
        raise


def _require_verb_for_several() -> None:
    """Only training is for several processes."""
    verb = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)
    if verb not in (None, "train", "resume") and (world := read_ranks().world) > 1:
        raise RecipeError(
            f"`longlora {verb}` runs in one process and was started in {world}: call it without a launcher"
        )


def _fault_of_the_place(error: OSError) -> str | None:
    """What a person can do about a disk or a path; None where the fault may be ours."""
    place = f" {error.filename}" if error.filename else ""
    if is_disk_full(error):
        return f"cannot write{place}: {error.strerror}; free space or choose another run_dir"
    if error.errno in _NO_ACCESS:
        return f"no access to{place}: {error.strerror}; check its permissions or choose another run_dir"
    if error.errno in _UNFIT_PATH:
        return f"cannot use{place}: {error.strerror}; choose another run_dir or output"
    return None


def _report_bug(error: Exception) -> None:
    """Of several processes the one that has it prints its traceback, and those that only lost contact a line."""
    if read_ranks().world > 1:
        _fail("".join(traceback.format_exception(error)), 1, error)


def _fail(message: str, code: int, error: BaseException) -> None:
    ranks = read_ranks()
    if ranks.world > 1:
        report(ranks, error, message)
        sys.stdout.flush()
        # At once: a communicator that still waits for other processes may hold Python up on its way out.
        os._exit(code)
    print(f"longlora: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _show_choices() -> None:
    """What is chosen automatically, such as the backend of attention, is logged; here that is a line on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("longlora")
    logger.handlers = [handler if read_ranks().is_main else logging.NullHandler()]
    logger.propagate = read_ranks().is_main
    logger.setLevel(logging.INFO)


def _quiet_libraries() -> None:
    """Only what a person can act on: the libraries' progress bars and deprecation notes are not."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="(torch|peft|accelerate|transformers).*")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not read_ranks().is_main:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)

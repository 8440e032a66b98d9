"""The errors a user can cause. The command line prints each as one line and exits with code 2."""

from __future__ import annotations


class LongLoraError(Exception):
    """Something the user can repair: the message says the value, the limit and the remedy."""


class RecipeError(LongLoraError):
    """A recipe key or value that is not understood."""


class DataError(LongLoraError):
    """Input text, token shards or their manifest that cannot be used."""


class ModelError(LongLoraError):
    """A model, adapter or attention setting that cannot be used."""


class UnsupportedModelError(ModelError):
    """An architecture that shifted sparse attention does not support."""


class RunFolderError(LongLoraError):
    """A run folder that is in use, incomplete or damaged."""


class PlanError(LongLoraError):
    """A run that the machine cannot hold, or a machine that is not known."""


class InterruptedRunError(LongLoraError):
    """A run that a signal stopped once its step was saved; `exit_code` is what a shell has for that signal."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def one_line(error: BaseException, most: int | None = None) -> str:
    """What another library says of `error`, in one line of at most `most` characters; its kind if it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__

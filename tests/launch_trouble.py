"""``python -m longlora`` in which something happens to one process, or ``every`` one: ``TROUBLE=WHAT:RANK:STEP``."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from longlora.cli.app import main


def happen(what: str) -> None:
    """In the middle of a step: before its first forward pass."""
    if what == "killed":
        Path(os.environ["TROUBLE_CLOCK"]).write_text(str(time.time()), encoding="ascii")
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
    if what == "error":
        from longlora.errors import ModelError

        raise ModelError("this process has an error of its own")


def prepare(what: str, step: int) -> None:
    from guard_jobs import bad_gradient, nan_loss

    from longlora.training.loop import LongContextTrainer
    from longlora.training.loss_model import LossModel

    spoilers = {"nan": nan_loss, "gradient": bad_gradient}
    train_step, forward = LongContextTrainer.training_step, LossModel.forward
    now = [0]

    def noted(self: Any, *arguments: Any) -> Any:
        now[0] = self.state.global_step + 1
        if now[0] == step:
            happen(what)
        return train_step(self, *arguments)

    def damaged(self: Any, *arguments: Any, **named: Any) -> Any:
        outputs = forward(self, *arguments, **named)
        spoil = spoilers.get(what) if now[0] == step else None
        return {"loss": spoil(outputs["loss"])} if spoil else outputs

    LongContextTrainer.training_step, LossModel.forward = noted, damaged  # type: ignore[method-assign]


def run() -> None:
    what, rank, step = os.environ["TROUBLE"].split(":")
    if rank in (os.environ["RANK"], "every"):
        if what == "no deepspeed":
            sys.modules["deepspeed"] = None  # type: ignore[assignment]  # as if it were not installed
        elif what == "recipe":
            sys.argv.append("train.learning_rate=0.5")
        elif what == "data":
            from longlora.training import trainer

            trainer.sha256_file = lambda path: "0" * 64  # type: ignore[assignment]
        else:
            prepare(what, int(step))
    main()


if __name__ == "__main__":
    run()

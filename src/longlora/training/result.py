"""What a finished run leaves: the folder adapter/, or the whole model in merged/ after full fine-tuning."""

from __future__ import annotations

import gc
from pathlib import Path

from peft import PeftModel
from rich.console import Console
from torch import Tensor

from longlora.artifacts import RunFolder, new_folder, write_manifest
from longlora.model.merge import tokenizer_of, write_whole_model
from longlora.model.sidecar import Sidecar, write_sidecar
from longlora.model.trainable import TrainedModel, save_trained, trained_weights


def write_result(
    model: TrainedModel,
    sidecar: Sidecar,
    run: RunFolder,
    step: int,
    console: Console,
    weights: dict[str, Tensor] | None = None,
) -> Path:
    """Write what was trained, whole or not at all, and return its folder.

    A whole model is verified as a merged one is: read back, and compared with what was trained.

    Args:
        model: as it was trained.
        sidecar: goes beside the weights.
        run: where to.
        step: of the run.
        console: for a person.
        weights: as `save_trained` takes them.

    Raises:
        ModelError: what was written is not what was trained; the last checkpoint holds the weights.
        RunFolderError: the folder exists.
    """
    if not isinstance(model, PeftModel):
        gc.collect()  # the optimizer is no longer needed, and two more copies of the weights come now
        check = write_whole_model(weights or trained_weights(model), sidecar, run.merged, step=step)
        console.print(f"the whole model was written and verified: {check.summary()}", highlight=False)
        return run.merged
    with new_folder(run.adapter) as folder:
        save_trained(model, folder, weights)
        if sidecar.chat_template is not None:
            tokenizer_of(sidecar).save_pretrained(folder)
        write_sidecar(folder, sidecar)
        write_manifest(folder, schema=1, step=step)
    return run.adapter

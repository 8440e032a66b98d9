"""transformers' own OpenAI-compatible server, started on a merged model. Nothing of the server is ours."""

from __future__ import annotations

from pathlib import Path

from longlora.config import ModelConfig
from longlora.errors import ModelError, one_line
from longlora.inference.address import require_free
from longlora.inference.load import locate
from longlora.model.build import load_config


def served_model(name: str) -> str:
    """The model folder (or hub id) to serve; it is also the ``model`` that clients have to name.

    Raises:
        ModelError: it is an adapter, which the server cannot load, or a path that the server takes for something else.
        RunFolderError: there is no model in the folder.
    """
    source = locate(name)
    if source.kind == "adapter":
        folder = Path(source.name)
        run = folder.parent if (folder.parent / "recipe.yaml").is_file() else Path("RUN")
        raise ModelError(
            f"{folder} is an adapter, and servers load ordinary models: run `longlora merge {run}`, then "
            f"`longlora serve {run}`"
        )
    if "@" in source.name and Path(source.name).exists():
        raise ModelError(f"transformers serve takes what follows @ in {source.name} for a revision: rename the folder")
    return source.name


def served_window(name: str) -> int | None:
    """Tokens that the model handles, if its config says so: the server itself takes longer prompts without a word.

    Raises:
        ModelError: the config cannot be read.
    """
    config = load_config(ModelConfig(name_or_path=name)).get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None)


def serve(model: str, host: str, port: int) -> None:
    """Serve ``/v1/chat/completions`` and its relatives until interrupted.

    Raises:
        DataError: nothing can listen on `host` and `port`.
        ModelError: the packages of the server are missing, or the model cannot be loaded.
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ModelError("the server needs more packages: pip install 'longlora[serve]'")
    require_free(host, port)
    from transformers.cli.serve import Serve

    try:
        Serve(force_model=model, host=host, port=port, trust_remote_code=False, enable_cors=False)
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise ModelError(f"model {model} cannot be served ({reason}): give a merged model folder") from error

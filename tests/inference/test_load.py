"""What a name stands for, and that base + adapter answers as the merged model does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inference_cases import TEMPLATE, WINDOW, save_askable, save_askable_adapter
from tiny import save_tiny_model

from longlora.artifacts import write_manifest
from longlora.errors import LongLoraError
from longlora.inference.address import is_loopback, require_free, warning
from longlora.inference.load import load, locate
from longlora.inference.prompt import Message
from longlora.inference.serve import served_model
from longlora.inference.session import LongSession
from longlora.model.merge import merge_adapter
from longlora.model.sidecar import read_sidecar, write_sidecar


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_askable(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """A run folder that holds an adapter for twice the context."""
    save_askable_adapter(base, tmp_path / "run" / "adapter", 2 * WINDOW)
    (tmp_path / "run" / "recipe.yaml").write_text("")
    return tmp_path / "run"


def said(name: Path) -> tuple[str, int]:
    session = LongSession(*load(str(name)))
    answer = session.ask([Message("user", "Why?", ("It was a bright cold day in April. " * 40,))], max_new_tokens=16)
    return "".join(answer), session.window


def test_adapter_run_and_merged_model_answer_alike(base: Path, run: Path) -> None:
    merge_adapter(run / "adapter", run / "elsewhere")
    expected = said(run / "elsewhere")
    assert expected[1] == 2 * WINDOW
    assert said(run / "adapter") == expected
    assert said(run) == expected
    with pytest.raises(LongLoraError, match=r"the model's window is 1,024"):
        said(base)
    # The merged model of a run counts before its adapter.
    (run / "elsewhere").rename(run / "merged")
    assert locate(str(run)).name == str(run / "merged")
    assert load(str(run))[0].dtype == torch.float32


def test_the_stored_template_counts_before_the_base_models(run: Path) -> None:
    assert load(str(run))[1].chat_template == TEMPLATE
    sidecar = read_sidecar(run / "adapter")
    write_sidecar(run / "adapter", replace(sidecar, chat_template="stored {{ messages[0].content }}"))
    write_manifest(run / "adapter")
    assert load(str(run))[1].chat_template == "stored {{ messages[0].content }}"
    (run / "given.jinja").write_text("given")
    assert load(str(run), run / "given.jinja")[1].chat_template == "given"


def test_answers_end_where_they_did_in_training(base: Path, run: Path) -> None:
    # The end of a text is </s>, which is all that the base model knows.
    template = "{% for m in messages %}{{ m['content'] }}{{ '<s>' if m['role'] == 'assistant' }}{% endfor %}"
    write_sidecar(run / "adapter", replace(read_sidecar(run / "adapter"), chat_template=template))
    write_manifest(run / "adapter")
    merge_adapter(run / "adapter", run / "elsewhere")
    assert load(str(base))[0].generation_config.eos_token_id == 2
    for folder in (run / "adapter", run / "elsewhere"):
        assert load(str(folder))[0].generation_config.eos_token_id == [2, 1]


def test_what_is_no_model_is_one_line(base: Path, run: Path, tmp_path: Path) -> None:
    plain = save_tiny_model(tmp_path / "plain")
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "adapter_config.json").write_text("{}")
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "recipe.yaml").write_text("")
    for name, expected in (
        (plain, "has no chat template, so it is not known how to ask: give --chat-template"),
        (tmp_path / "empty", r"holds no model \(config.json\), adapter"),
        (tmp_path / "foreign", "is an adapter without longlora.json"),
        (tmp_path / "started", "holds neither merged/ nor adapter/: run `longlora train` first"),
        (tmp_path / "nowhere", "nowhere' cannot be read"),
    ):
        with pytest.raises(LongLoraError, match=expected) as refused:
            load(str(name))
        assert "\n" not in str(refused.value)
    with pytest.raises(LongLoraError, match="chat template none.jinja cannot be read"):
        load(str(base), Path("none.jinja"))
    weights = next((run / "adapter").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(LongLoraError, match="bytes, its manifest says"):
        load(str(run))


def test_only_ordinary_models_are_served(base: Path, run: Path, tmp_path: Path) -> None:
    assert served_model(str(base)) == str(base)
    with pytest.raises(
        LongLoraError, match=rf"is an adapter.* run `longlora merge {run}`, then `longlora serve {run}`"
    ):
        served_model(str(run))
    named = save_askable(tmp_path / "a@b")
    with pytest.raises(LongLoraError, match="for a revision: rename the folder"):
        served_model(str(named))


def test_addresses() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::", "example.org")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    assert warning("127.0.0.1", "the page") is None
    assert "the page listens on 0.0.0.0 without a password" in str(warning("0.0.0.0", "the page"))
    for host, port, expected in (("127.0.0.1", 0, "port 0 is not from 1"), ("192.0.2.1", 8000, "cannot listen on")):
        with pytest.raises(LongLoraError, match=expected):
            require_free(host, port)

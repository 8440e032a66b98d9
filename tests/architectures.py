"""Every decoder-only causal language model of the installed transformers, tiny and with random weights.

Each entry is built from the model type's own config class with every kind of layer it knows. `support` says what
S2-Attn does on it, both for `attention/test_architectures.py` and for the table of `docs/make_architectures.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from tiny import VOCABULARY
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from longlora.attention.check import CheckResult, check_model
from longlora.attention.registry import use_full, use_s2
from longlora.errors import LongLoraError

# What a config class is given of these depends on which names it declares. Windows are far shorter than the sequences
# of the tests.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Large enough that attention is not uniform: a leak must show.
    "initializer_range": 0.2,
    "init_std": 0.2,
    # Experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "router_jitter_noise": 0.0,
    # Multi-head latent attention: value heads of another size than query and key heads.
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    # Sparse indexers.
    "index_topk": 4,
    "index_n_heads": 2,
    "index_head_dim": 8,
    # State-space and linear-attention layers.
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


@dataclass(frozen=True, eq=False)
class Architecture:
    """One row of the table.

    Args:
        model_type: the key of transformers' auto classes.
        remark: what is special about its attention.
        settings: arguments of the config class beside `_COMMON`.
        variant: tells two entries of one model type apart.
        refused: part of the error with which `use_s2` refuses the model, a key of `REASONS`; None if it works.
        not_applicable: checks of `longlora.attention.check` that the model can't pass whatever S2-Attn does, with the
            reason.
    """

    model_type: str
    remark: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""
    refused: str | None = None
    not_applicable: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.model_type} ({self.variant})" if self.variant else self.model_type

    @property
    def known(self) -> bool:
        """Whether the installed transformers has this model type."""
        return self.model_type in CONFIG_MAPPING

    def build(self, seed: int = 0) -> PreTrainedModel:
        """A new model in float32 on the CPU, in evaluation mode."""
        config_class = CONFIG_MAPPING[self.model_type]
        declared = {f.name: f.default for f in dataclasses.fields(config_class)}
        other_names = getattr(config_class, "attribute_map", {})
        common = {}
        for name, value in _COMMON.items():
            own = other_names.get(name, name)
            if own in declared or name in declared:
                common[own if own in declared else name] = value
        # Two passes in training mode must agree.
        no_dropout = {n: 0.0 for n, default in declared.items() if "drop" in n and isinstance(default, int | float)}
        config = config_class(**{**common, **no_dropout, **self.settings})
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config).float().eval()
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")  # the default has no float64
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Biases and norms begin as zeros or ones, learned sinks as zeros in some: that would hide them.
                if parameter.ndim == 1:
                    parameter.add_((1.0 if "sink" in name else 0.1) * torch.randn(parameter.shape))
        return model


@dataclass(frozen=True)
class Support:
    """What S2-Attn does on one architecture: a refusal, or the results of all checks."""

    layers: str
    refused: str | None
    results: tuple[CheckResult, ...]


@cache
def support(architecture: Architecture) -> Support:
    """Build the model and run ``longlora check`` on it."""
    model = architecture.build()
    refused = refusal(model)
    use_full(model)
    return Support(_layers(model), refused, () if refused else tuple(check_model(model)))


def refusal(model: PreTrainedModel) -> str | None:
    """The error of `use_s2`, or of the first step in training where it can only be known then; the mode is kept."""
    ids = torch.arange(3, 3 + 40)[None]
    training = model.training
    try:
        use_s2(model, group_size=16, sink_tokens=2)
        model.train()(input_ids=ids, labels=ids)
    except LongLoraError as error:
        return str(error)
    finally:
        model.train(training)
    return None


def _layers(model: PreTrainedModel) -> str:
    """The kinds of layers in words of transformers, each once."""
    config: Any = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding" if getattr(config, "sliding_window", None) else "full"]
    return ", ".join(dict.fromkeys(kind.removesuffix("_attention") for kind in kinds))


# A check that fails for reasons of the model: nothing that S2-Attn could change.
_PACKED = "packed documents do not see each other"
_STATE = {_PACKED: "its states or convolutions carry over from one document to the next"}

# Parts of the errors with which models are refused.
_OWN_CODE = "does not dispatch through transformers' AttentionInterface"
_INDEXED = "indexed_attention"
_COMPRESSED = "compressed_sparse_attention"
_BLOCKS = "minimax_m3_sparse"
_DYNAMIC = "mask"
_BIAS = "a learned position bias"
_WINDOWS = "have a window"
REASONS: Mapping[str, str] = {
    _OWN_CODE: "its attention does not go through transformers' interface",
    _INDEXED: "layers that see the keys a learned index chooses",
    _COMPRESSED: "layers that see compressed keys",
    _BLOCKS: "layers that see the blocks of keys a learned index chooses",
    _BIAS: "scores with a learned position bias",
    _DYNAMIC: "a mask computed from the values",
    _WINDOWS: "all layers with attention have a window and keep it, so nothing would change",
}
"""What the table says of them."""

# Remarks.
_MLA = "multi-head latent attention: value heads of another size"
_SOME = "sliding window on some layers"
_SINKS = "learned attention sinks"
_PARTIAL = "partial rotary"
_QK_NORM = "normalised queries and keys"
_SCALE = "scale of scores from the config"
_LEARNED = "learned positions"
_LINEAR = "hybrid: linear-attention layers"
_STATES = "hybrid: state-space layers"
_CONVOLUTIONS = "hybrid: convolution layers"

# Settings.
_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
_QWEN = {"use_sliding_window": True, **_MIXED}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_CONV = {"layer_types": ["conv", "full_attention"]}
# Latents are expanded to as many key as query heads; `head_dim` means the part of them with RoPE.
_LATENT = {"num_key_value_heads": 4, "head_dim": 4}
_SCALED = {"attention_multiplier": 0.5}
_CAPPED = {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
_NO_WINDOW = {"sliding_window": None}
_INKLING = {
    "layer_types": ["hybrid_sliding", "hybrid"],
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
}


def _works(
    model_type: str, remark: str = "", not_applicable: Mapping[str, str] | None = None, **settings: Any
) -> Architecture:
    return Architecture(model_type, remark, settings, not_applicable=not_applicable or {})


def _refused(model_type: str, reason: str, remark: str = "", variant: str = "", **settings: Any) -> Architecture:
    return Architecture(model_type, remark, settings, variant, reason)


ARCHITECTURES: tuple[Architecture, ...] = (
    _works("afmoe", f"experts; {_SOME}; {_QK_NORM}; gated output", **_MIXED, num_dense_layers=1),
    _works("apertus", _QK_NORM),
    _works("arcee"),
    _works("aria_text", "experts", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
    _works("axk1", f"experts; {_MLA}", **_LATENT),
    _refused("axk2", _INDEXED, f"experts; {_MLA}", **_LATENT),
    _works("bailing_hybrid", f"{_LINEAR}; experts; {_MLA}", _STATE, **_LATENT, **_HYBRID),
    _works("bamba", _STATES, _STATE, attn_layer_indices=[1]),
    _works("beam", f"experts; {_SOME}; {_QK_NORM}"),
    _works("biogpt", _LEARNED),
    _works("bitnet"),
    _refused("bloom", _OWN_CODE, "ALiBi"),
    _refused("codegen", _OWN_CODE, _PARTIAL, rotary_dim=4),
    _works("cohere", "attention beside the MLP"),
    _works("cohere2", f"{_SOME}, no RoPE on the others", **_MIXED),
    _works("cohere2_moe", f"experts; {_SOME}, no RoPE on the others", **_MIXED),
    _works("cohere_compass_text", f"{_SOME}, no RoPE on the others", **_MIXED,
        rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": None}),
    _works("ctrl", "fixed sine positions", dff=48),
    _works("cwm", _SOME),
    _works("dbrx", "experts; clipped queries, keys and values", ffn_config={"ffn_hidden_size": 16, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}),
    _works("deepseek_v2", f"experts; {_MLA}", **_LATENT),
    _works("deepseek_v3", f"experts; {_MLA}", **_LATENT),
    _refused("deepseek_v32", _INDEXED, f"experts; {_MLA}", **_LATENT),
    _refused("deepseek_v4", _COMPRESSED, f"{_SOME}; {_SINKS}; experts", o_groups=2, o_lora_rank=8,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}),
    _works("diffllama", "differential attention"),
    _refused("doge", _DYNAMIC, "", **_NO_WINDOW, keep_window_size=8),
    _works("dots1", f"experts; {_SOME}; {_QK_NORM}", **_MIXED),
    _refused("dots3_note_text", _INDEXED, f"experts; {_MLA}", **_LATENT,
        shared_experts_intermediate_size=16),
    _works("ernie4_5"),
    _works("ernie4_5_moe", "experts", moe_k=2,
        moe_num_experts=4, moe_num_shared_experts=1),
    _works("exaone4", f"{_SOME}, no RoPE on the others; {_QK_NORM}", **_MIXED),
    _works("exaone_moe", f"experts; {_SOME}, no RoPE on the others; {_QK_NORM}", **_MIXED),
    _refused("falcon", _OWN_CODE, "one key/value head"),
    _works("falcon_h1", "hybrid: state space beside attention in each layer", _STATE),
    _refused("falcon_mamba", _OWN_CODE, "state-space layers only", state_size=8),
    _works("flex_olmo", f"experts; {_QK_NORM}"),
    _works("flint", f"experts; {_SOME}, no RoPE on the others; {_SINKS}", **_MIXED),
    _works("gemma"),
    _works("gemma2", f"{_SOME}; soft-capped scores", **_CAPPED),
    _works("gemma3_text", f"{_SOME}; {_QK_NORM}", **_MIXED, query_pre_attn_scalar=8),
    _works("gemma3n_text", f"{_SOME}; last layers use keys and values of earlier ones", num_hidden_layers=4,
        layer_types=_MIXED["layer_types"] * 2, num_kv_shared_layers=2, vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8, laurel_rank=8, activation_sparsity_pattern=[0.0] * 4),
    _works("gemma4_text", f"{_SOME}, larger heads on the others", **_MIXED, global_head_dim=16,
        vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8),
    _works("gemma4_unified_text", f"{_SOME}, larger heads on the others", **_MIXED, global_head_dim=16),
    _works("glm", _PARTIAL),
    _works("glm4", _PARTIAL),
    _works("glm4_moe", f"experts; {_PARTIAL}"),
    _works("glm4_moe_lite", f"experts; {_MLA}", **_LATENT),
    _refused("glm_moe_dsa", _INDEXED, f"experts; {_MLA}", **_LATENT),
    _works("gpt2", _LEARNED),
    _works("gpt_bigcode", f"{_LEARNED}; one key/value head"),
    _refused("gpt_neo", _OWN_CODE, f"{_LEARNED}; window on every other layer", num_layers=2, window_size=8,
        attention_types=[[["global", "local"], 1]]),
    _works("gpt_neox", _PARTIAL),
    _refused("gpt_neox_japanese", _OWN_CODE),
    _works("gpt_oss", f"experts; {_SOME}; {_SINKS}"),
    _refused("gptj", _OWN_CODE, _PARTIAL, rotary_dim=4),
    _works("granite", _SCALE, **_SCALED),
    _works("granite_swa", f"{_SOME}; {_SINKS}", **_SCALED),
    _works("granitemoe", f"experts; {_SCALE}", **_SCALED),
    _works("granitemoe_swa", f"experts; {_SOME}; {_SINKS}", **_SCALED),
    _works("granitemoehybrid", f"{_STATES}; experts", _STATE, **_HYBRID),
    _works("granitemoeshared", f"experts; {_SCALE}", **_SCALED),
    _works("helium"),
    _works("hrm_text", "layers used several times"),
    _works("hunyuan_v1_dense", _QK_NORM),
    _works("hunyuan_v1_moe", f"experts; {_QK_NORM}", moe_topk=2),
    _works("hy_v3", f"experts; {_QK_NORM}"),
    _refused("hy_v4", _INDEXED, f"{_SINKS}; experts; {_MLA}", **_LATENT),
    _works("hyperclovax", _SCALE, **_SCALED),
    _refused("inkling2_text", _BIAS, "own sinks", **_INKLING),
    _refused("inkling_text", _BIAS, "", **_INKLING),
    _works("internlm3"),
    _works("iquestcoder"),
    _works("jais2"),
    _works("jamba", f"{_STATES}; experts", _STATE, attn_layer_period=2, attn_layer_offset=1),
    _works("jetmoe", "experts, also for query heads", kv_channels=8),
    _works("kimi_linear", f"{_LINEAR}; experts; {_MLA}", _STATE, **_LATENT, **_HYBRID, linear_num_heads=2,
        linear_head_dim=8),
    _works("kolibri1", f"experts; {_SOME}; {_QK_NORM}", **_MIXED),
    _works("laguna", f"experts; {_SOME}; {_PARTIAL}; gated output", **_MIXED),
    _works("lfm2", _CONVOLUTIONS, _STATE, **_CONV),
    _works("lfm2_moe", f"{_CONVOLUTIONS}; experts", _STATE, **_CONV, num_dense_layers=1),
    _works("lfm3", f"{_CONVOLUTIONS}; {_SOME}", _STATE, num_hidden_layers=3,
        layer_types=["conv", "sliding_attention", "full_attention"]),
    _works("llama"),
    _works("llama4_text", "experts; chunks on some layers, no RoPE on the others",
        {_PACKED: "its scale of queries on layers without RoPE counts from the beginning of the row"},
        layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0], attention_chunk_size=8,
        intermediate_size_mlp=48, floor_scale=8),
    _works("longcat_flash", f"experts; {_MLA}", **_LATENT, num_layers=1, ffn_hidden_size=48, expert_ffn_hidden_size=16,
        moe_topk=2, zero_expert_num=2),
    _refused("mamba", _OWN_CODE, "state-space layers only", state_size=8),
    _refused("mamba2", _OWN_CODE, "state-space layers only", num_heads=4, head_dim=16, state_size=8, n_groups=1),
    _works("mellum", f"experts; {_SOME}; {_QK_NORM}", **_MIXED),
    _works("mimo_v2_flash", f"experts; {_SOME}; {_SINKS} on these; value heads of another size"),
    _works("minicpm3", _MLA, **_LATENT),
    _works("minimax", f"{_LINEAR}; experts", _STATE, **_NO_WINDOW),
    _works("minimax_m2", f"experts; {_PARTIAL}; {_QK_NORM}"),
    _refused("minimax_m3_vl_text", _BLOCKS, "experts", dense_intermediate_size=48,
        layer_types=["full_attention", "minimax_m3_sparse"], index_block_size=8, index_topk_blocks=1, rotary_dim=4),
    _works("ministral", _SOME, **_MIXED),
    _works("ministral3", "scale of queries grows with the position", **_NO_WINDOW),
    _works("mistral", "", **_NO_WINDOW),
    _refused("mistral", _WINDOWS, "sliding window on all layers", "window"),
    _works("mixtral", "experts", **_NO_WINDOW),
    _works("modernbert-decoder", _SOME, local_attention=8),
    _refused("mpt", _OWN_CODE, "ALiBi"),
    _works("nanochat", _QK_NORM),
    _works("nemotron", _PARTIAL),
    _works("nemotron_h", _STATES, _STATE, layers_block_type=["mamba", "attention"], ssm_state_size=8,
        mamba_num_heads=4, mamba_head_dim=16, n_groups=1),
    _works("olmo"),
    _works("olmo2", _QK_NORM),
    _works("olmo3", f"{_SOME}; {_QK_NORM}", **_MIXED),
    _works("olmo_hybrid", _LINEAR, _STATE),
    _works("olmoe", f"experts; {_QK_NORM}"),
    _refused("openai-gpt", _OWN_CODE, _LEARNED),
    _works("opt", _LEARNED, ffn_dim=48, word_embed_proj_dim=32),
    _works("persimmon", f"{_PARTIAL}; {_QK_NORM}"),
    _works("phi", _PARTIAL),
    _works("phi3", "", **_NO_WINDOW),
    # Its routers get a gradient only where several experts come within the noise of each other.
    _works("phimoe", "experts", **_NO_WINDOW, router_jitter_noise=0.5),
    _works("qwen2", _SOME, **_QWEN),
    _works("qwen2_moe", f"experts; {_SOME}", **_QWEN),
    _works("qwen3", f"{_SOME}; {_QK_NORM}", **_QWEN),
    _works("qwen3_5_moe_text", f"{_LINEAR}; experts", _STATE, **_HYBRID),
    _works("qwen3_5_text", _LINEAR, _STATE, **_HYBRID),
    _works("qwen3_moe", f"experts; {_QK_NORM}"),
    _works("qwen3_next", f"{_LINEAR}; experts", _STATE, **_HYBRID),
    _refused("qwen4_exp_text", _INDEXED, f"{_LINEAR}; keys chosen by a learned index; experts", **_HYBRID,
        hc_lowrank=8, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8,
        indexer_compress_ratio=4),
    _refused("recurrent_gemma", _WINDOWS, "hybrid: recurrent layers; sliding window on the others",
        block_types=("recurrent", "attention")),
    _refused("rwkv", _OWN_CODE, "recurrent layers only", attention_hidden_size=32),
    _works("seed_oss"),
    _works("smollm3", "no RoPE on some layers", no_rope_layer_interval=2),
    _works("solar_open", "experts"),
    _works("stablelm", _PARTIAL),
    _works("starcoder2", "", **_NO_WINDOW),
    _works("vaultgemma", f"{_SOME}; soft-capped scores", **_CAPPED),
    _refused("xglm", _OWN_CODE, "fixed sine positions", ffn_dim=48),
    _refused("xlstm", _OWN_CODE, "recurrent layers only", num_heads=2, hidden_size=64, qk_dim_factor=1.0),
    _works("youtu", _MLA, **_LATENT),
    _works("zamba", _STATES, _STATE, num_hidden_layers=3, attention_head_dim=16,
        layers_block_type=["linear_attention", "hybrid", "hybrid"]),
    _works("zamba2", _STATES, _STATE, layers_block_type=["linear_attention", "hybrid"], attention_head_dim=16,
        n_mamba_heads=4, mamba_d_state=8, adapter_rank=4),
    _works("zaya", f"{_CONVOLUTIONS.replace(' layers', 's of queries and keys')}; experts; {_SOME}", _STATE,
        layer_types=["hybrid_sliding", "hybrid"], num_experts_per_tok=1, router_hidden_size=8),
)  # fmt: skip

# Model types of transformers' causal-LM class that are not in the list, by the reason.
OTHERS: Mapping[str, tuple[str, ...]] = {
    "encoders, and decoders of an encoder-decoder": (
        "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert",
        "data2vec-text", "electra", "ernie", "git", "marian", "mbart", "megatron-bert", "moshi", "musicgen",
        "musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "reformer", "rembert", "roberta",
        "roberta-prelayernorm", "roc_bert", "roformer", "trocr", "whisper", "xlm", "xlm-roberta", "xlm-roberta-xl",
        "xlnet", "xmod",
    ),
    "models of several modalities, whose text model counts": (
        "dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "got_ocr2", "llama4", "mllama",
        "moss_transcribe_diarize", "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp",
    ),
    "drafts for another model": ("gemma4_assistant", "gemma4_unified_assistant"),
    "models with input of their own kind (bytes in patches, prompts)": ("blt", "cpmant"),
    "other names of gpt2": ("gpt-sw3",),
}  # fmt: skip

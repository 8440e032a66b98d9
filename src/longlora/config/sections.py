"""The sections of a recipe: their keys, limits and defaults.

The string below a field says what it means; docs/make_cli.py prints it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from longlora.config.instruct import InstructConfig
from longlora.config.section import Section


class ModelConfig(Section):
    """Which model is extended."""

    name_or_path: str
    """Local folder or hub id of a causal language model. Remote code is never run."""
    revision: str | None = None
    """Hub revision; ignored for a local folder."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the frozen weights, of what is computed and of the merged model. Trained weights are always float32
    while training."""
    quantization: Literal["none", "nf4"] = "none"
    """``nf4`` keeps the frozen linear weights in 4 bits while training, through bitsandbytes (QLoRA, Dettmers et al.
    2023). Evaluation and merge read the unquantized model."""
    original_context_length: int | None = Field(default=None, gt=0)
    """Tokens the base model was trained for. Needed only where its config does not say it unambiguously."""


class ContextConfig(Section):
    """The context to reach and how rotary position embeddings are rescaled to it."""

    context_length: int = Field(gt=0)
    """Tokens the model shall handle afterwards; longer than the model's own context. With ``data.kind: instruct`` also
    tokens of the longest example: up to the model's own context RoPE is then left as it is."""
    rope_type: Literal["auto", "linear", "yarn", "theta"] = "auto"
    """``auto`` keeps the scaling that the model already has (llama3, yarn, linear) and otherwise uses yarn. ``linear``
    is position interpolation, the choice of the LongLoRA paper; ``theta`` enlarges the base of the frequencies."""
    rope_factor: float | None = Field(default=None, gt=1)
    """How far positions are stretched; null means new over original context length. A larger one leaves room at the
    end of the new context."""


class AttentionConfig(Section):
    """Shifted sparse attention (S2-Attn), used while training only."""

    pattern: Literal["s2", "full"] = "s2"
    """``full`` trains with full attention: the expensive baseline."""
    group_size: int | None = Field(default=2048, gt=0)
    """Tokens in a group; even. Set to null when `group_size_ratio` is given."""
    group_size_ratio: float | None = Field(default=None, gt=0, le=1)
    """Group size as a part of the context length; 0.25 is the paper's choice."""
    sink_tokens: int = Field(default=4, ge=0)
    """First tokens of each document that every group may attend to; 0 is the paper's pattern."""
    shift: Literal["heads", "layers", "none"] = "heads"
    """``heads`` shifts groups by half in the second half of the heads (the paper); ``layers`` in all heads of every
    other layer; ``none`` never."""
    full_attention_layers: list[int] = Field(default_factory=list)
    """Layers, counted from 0, that are trained with full attention; each once."""
    full_attention_final_fraction: float = Field(default=0.0, ge=0, le=1)
    """The last part of the steps, trained with full attention in all layers: 0.1 is the last tenth."""
    backend: Literal["auto", "grouped", "varlen", "flex"] = "auto"
    """What computes sparse attention: ``grouped`` on any device, ``varlen`` and ``flex`` on CUDA."""

    @model_validator(mode="after")
    def _groups_are_possible(self) -> AttentionConfig:
        if (self.group_size is None) == (self.group_size_ratio is None):
            raise ValueError(
                f"group_size={self.group_size} and group_size_ratio={self.group_size_ratio}: "
                "give exactly one of them and set the other to null"
            )
        if self.group_size is None:
            return self
        if self.group_size % 2:
            near = sorted({max(2, self.group_size - 1), self.group_size + 1})
            raise ValueError(
                f"group_size={self.group_size} is odd, and half a group must be whole tokens whatever the shift: "
                f"give {' or '.join(map(str, near))}"
            )
        if self.sink_tokens >= self.group_size:
            raise ValueError(
                f"sink_tokens={self.sink_tokens} must be less than group_size={self.group_size}: lower sink_tokens or "
                f"raise group_size to at least {even_above(self.sink_tokens)}"
            )
        return self

    @model_validator(mode="after")
    def _layers_are_named_once(self) -> AttentionConfig:
        layers = self.full_attention_layers
        if negative := [layer for layer in layers if layer < 0]:
            raise ValueError(
                f"full_attention_layers={layers} has {negative[0]}, and layers are counted from 0: give numbers from "
                "0 to the number of layers - 1"
            )
        if twice := sorted({layer for layer in layers if layers.count(layer) > 1}):
            raise ValueError(f"full_attention_layers={layers} names layer {twice[0]} more than once: name it once")
        return self

    def resolve_group_size(self, context_length: int) -> int:
        """Tokens in a group at `context_length`; a ratio is rounded down to an even number."""
        if self.group_size is not None:
            return self.group_size
        assert self.group_size_ratio is not None
        return max(2, int(context_length * self.group_size_ratio) // 2 * 2)


def even_above(tokens: int) -> int:
    """The smallest group that holds more than `tokens`."""
    return tokens // 2 * 2 + 2


class AdapterConfig(Section):
    """What is trained: LoRA on linear layers, plus embeddings and norms in full (paper, section 3.3); or everything."""

    method: Literal["lora", "full"] = "lora"
    """``full`` is full fine-tuning: every parameter is trained, no adapter is made, and `longlora train` leaves the
    whole model in merged/. The other settings of this section are those of ``lora``."""
    r: int = Field(default=8, gt=0)
    """Rank of the LoRA matrices."""
    lora_alpha: int = Field(default=16, gt=0)
    """The LoRA update is scaled by lora_alpha / r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Part of the LoRA inputs that is dropped in training."""
    target_modules: Literal["attention", "all-linear"] | list[str] = "attention"
    """``attention`` is all linear layers of the attention modules (q, k, v and output: the paper); or names as PEFT
    takes them."""
    train_embeddings: bool = True
    """Train the input embeddings in full; tied output embeddings with them."""
    embedding_rows: Literal["all", "occurring"] = "all"
    """``occurring`` trains only the rows whose tokens occur in the training texts: the others get no gradient from the
    input anyway, but where output embeddings are tied they get one, and are then left as they are."""
    train_norms: bool = True
    """Train all normalisation layers in full."""

    @model_validator(mode="after")
    def _full_has_no_other_settings(self) -> AdapterConfig:
        if self.method != "full":
            return self
        fields = type(self).model_fields
        others = [name for name in fields if name != "method" and getattr(self, name) != fields[name].default]
        if others:
            given = ", ".join(f"{name}={getattr(self, name)}" for name in others)
            raise ValueError(
                f"method=full trains every parameter and has no adapter, so that {given} would not be read: leave "
                f"{'it' if len(others) == 1 else 'them'} out (on the command line adapter={{method: full}} does) or "
                "set method=lora"
            )
        return self

    @model_validator(mode="after")
    def _rows_of_trained_embeddings(self) -> AdapterConfig:
        if self.embedding_rows != "all" and not self.train_embeddings:
            raise ValueError("embedding_rows=occurring needs train_embeddings=true: set it or leave embedding_rows out")
        return self


class DataConfig(Section):
    """Texts or instructions to train on and to measure on."""

    kind: Literal["text", "instruct"] = "text"
    """``text``: documents, every token of which is predicted. ``instruct``: questions and answers; only answers are
    predicted."""
    train: list[str] = Field(default_factory=list)
    """Files, folders, saved Hugging Face datasets or hub ids. Files: .txt, .md, .jsonl, .parquet; of instructions
    .json, .jsonl, .parquet."""
    heldout: list[str] = Field(default_factory=list)
    """Like `train`, never trained on; measured by `longlora eval`."""
    text_field: str = "text"
    """Column with the text in .jsonl, .parquet and datasets."""
    min_document_tokens: int = Field(default=0, ge=0)
    """Shorter documents are left out of both sets, and counted."""
    add_special_tokens: bool = True
    """Put the tokenizer's BOS and/or an EOS at the document bounds, where it has them. Not read for instructions: their
    template does it."""
    instruct: InstructConfig = Field(default_factory=InstructConfig)

    @model_validator(mode="after")
    def _weights_belong_to_sources(self) -> DataConfig:
        weights = self.instruct.weights
        if weights and len(weights) != len(self.train):
            raise ValueError(
                f"instruct.weights has {len(weights)} numbers and train {len(self.train)} sources: give one number for "
                "each source, or none"
            )
        return self


class ParallelConfig(Section):
    """How the processes of a run (`torchrun`, `accelerate launch`) share its work; read with one process too."""

    sequence: int = Field(default=1, gt=0)
    """Processes that share each row of tokens, a stretch for each; must divide the number of processes. Those that
    share no row are data parallel."""
    shard: Literal["none", "fsdp2", "zero2", "zero3"] = "none"
    """What the processes divide among themselves: ``none`` nothing, each holds the whole model; ``zero2`` gradients and
    optimizer states (DeepSpeed ZeRO-2); ``zero3`` (DeepSpeed ZeRO-3) and ``fsdp2`` (PyTorch) weights as well."""


class TrainConfig(Section):
    """The optimisation."""

    steps: int = Field(default=1000, gt=0)
    """Optimizer steps."""
    micro_batch_size: int = Field(default=1, gt=0)
    """Packed sequences per forward pass and process."""
    grad_accum_steps: int = Field(default=8, gt=0)
    """Micro batches in a step; every token of a step weighs the same however it is cut."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """AdamW's rate after the warmup."""
    warmup_steps: int = Field(default=20, ge=0)
    """Linear warmup from a rate of 0 in the first step; the rate is constant afterwards. 0: no warmup."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decay of the trained weights."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the mean of the gradients."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's decay of the mean of their squares."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The gradient is scaled down to this norm."""
    max_skipped_steps: int = Field(default=3, ge=0)
    """Steps of the whole run that may be left out because their loss or gradient is no number: the weights stay as they
    were, and the documents are named. One more stops the run."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Order of the sequences and initial LoRA weights."""
    activation_checkpointing: bool = True
    """Keep only the inputs of the layers and compute the rest again in the backward pass."""
    activation_checkpointing_every: int = Field(default=1, gt=0)
    """Checkpoint one layer in this many; the others keep what they computed: faster, with more memory."""
    activation_offload: bool = False
    """Keep the inputs of the checkpointed layers in main memory; CUDA only."""
    mlp_tile_tokens: int | None = Field(default=None, gt=0)
    """Tokens whose MLP activations exist at one time, computed again in the backward pass; null means all of a micro
    batch (ALST, Bekman et al. 2025)."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """``adamw`` is torch's fused one. The others keep its state in 8 bits, but for whole embeddings, through
    bitsandbytes on CUDA; ``paged`` lets it move to main memory."""
    liger_kernels: bool = False
    """Fused norms, RoPE and MLP activations of the package liger-kernel; CUDA only."""
    compile_norms: bool = False
    """Fuse the norms with torch.compile: a step of a small model on a CPU takes a tenth less, after half a minute of
    compiling, which needs a C++ compiler there."""
    loss_chunk_tokens: int = Field(default=1024, gt=0)
    """Tokens whose logits exist at one time."""
    logging_steps: int = Field(default=1, gt=0)
    """Steps between rows of metrics.jsonl."""
    save_steps: int = Field(default=100, gt=0)
    """Steps between checkpoints."""
    save_total_limit: int = Field(default=2, gt=0)
    """Complete checkpoints kept."""
    validation_steps: int | None = Field(default=None, gt=0)
    """Steps between measurements of the loss on the held-out data, with full attention, beginning before the first
    step; null means never."""
    validation_rows: int = Field(default=8, gt=0)
    """Packed rows of the held-out data that are measured each time: the first ones."""

    @model_validator(mode="after")
    def _checkpointing_is_on(self) -> TrainConfig:
        if not self.activation_checkpointing and (self.activation_checkpointing_every > 1 or self.activation_offload):
            raise ValueError(
                f"activation_checkpointing=false, but activation_checkpointing_every="
                f"{self.activation_checkpointing_every}, activation_offload={self.activation_offload}: "
                "set activation_checkpointing=true or leave them out"
            )
        return self


CHANGEABLE_ON_RESUME = (
    "steps",
    "max_skipped_steps",
    "activation_checkpointing",
    "activation_checkpointing_every",
    "activation_offload",
    "mlp_tile_tokens",
    "compile_norms",
    "loss_chunk_tokens",
    "save_steps",
    "save_total_limit",
    "validation_steps",
    "validation_rows",
)
"""Keys of `train` that a resumed run may change: its length, what it bears, and what changes results by rounding at
most."""

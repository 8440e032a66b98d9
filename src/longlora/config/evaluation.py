"""The section ``eval``: which tasks are measured, on which lengths and how often."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from longlora.config.section import Section

Length = Annotated[int, Field(gt=1)]
Lengths = Annotated[list[Length], Field(min_length=1)]
Depths = Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)]

Variant = Literal["base", "rope_only", "trained"]
Task = Literal["perplexity", "longppl", "passkey", "needle", "lines", "topics", "ruler", "questions"]
RulerTask = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
]


class PerplexityConfig(Section):
    """Loss on held-out documents."""

    protocol: Literal["press", "longlora", "truncate"] = "press"
    """``press``: each token is scored once (Press et al. 2021, section 2). ``longlora``: all positions of windows that
    advance by `stride` (256 unless given), as the original code does, for comparison with the paper's tables only.
    ``truncate``: the first tokens of each document, one window."""
    context_lengths: Lengths | None = None
    """Window sizes in tokens; null means the original and the new context length."""
    stride: int | None = Field(default=None, gt=0)
    """Tokens a window advances; null means the window size (disjoint windows), or 256 with ``longlora``."""
    tokens_per_document: Length | None = None
    """First tokens of each document that are scored; null means one window of each context length."""
    max_documents: int = Field(default=8, gt=0)
    """Documents that are read: the first ones that are long enough."""
    texts: list[str] = []
    """Read instead of the held-out shard: text, jsonl, parquet, or the original's ``.bin`` of uint16 tokens."""


class LongPPLConfig(Section):
    """Perplexity on the tokens that need a long context (Fang et al. 2024, LongPPL), with its published thresholds."""

    evaluator: str | None = None
    """Model folder or id that decides which tokens are key tokens; null means the base model."""
    context_length: Length | None = None
    """Tokens of the long context; null means the original context length, which the evaluator can read."""
    short_context: int = Field(default=4096, gt=1)
    """Tokens of the short context whose loss is compared with that of the long one."""
    block_tokens: int = Field(default=1024, gt=0)
    """Tokens that share one short context."""
    gain: float = Field(default=2.0, ge=0)
    """Nats by which the long context must lower the loss of a key token (alpha)."""
    ceiling: float = 2.0
    """Nats below which the loss of a key token in the long context must lie (beta)."""


class PasskeyConfig(Section):
    """Passkey retrieval on a grid of lengths and depths (Mohtashami and Jaggi 2023)."""

    lengths: Lengths | None = None
    """Prompt lengths in tokens; null means quarter, half, three quarters and all of the new context."""
    depths: Depths = [0.1, 0.5, 0.9]
    """Where the key stands: 0 is the beginning of the prompt, 1 its end. With ``heldout``: of the shortest length."""
    num_trials: int = Field(default=2, ge=0)
    """Keys per grid cell; 0 leaves the test out. With ``heldout`` every document is one trial."""
    haystack: Literal["filler", "heldout", "landmark"] = "filler"
    """``filler`` repeats the original five sentences, one prompt for each key. ``landmark`` does so as the original
    code does: cut at characters, a key of up to 50,000 at a random depth. ``heldout`` hides a number for each depth in
    the held-out documents, which are read anyway, and asks for all of them at every length."""


class NeedleConfig(Section):
    """Needles in a haystack of real text: several sentences with a number each, asked for one by one."""

    lengths: Lengths | None = None
    """Prompt lengths in tokens; null means those of passkey."""
    depths: Depths = [0.0, 0.25, 0.5, 0.75, 1.0]
    """Where the needle that is asked for stands."""
    distractors: int = Field(default=2, ge=0)
    """Other needles in the same prompt, of other names, at random places."""
    num_trials: int = Field(default=1, gt=0)
    """Prompts per grid cell, each over another part of the text."""
    kinds: Annotated[list[Literal["single", "uuid", "chain"]], Field(min_length=1)] = ["single"]
    """``single``: one needle answers, with a number; ``uuid``: with an id of 32 digits. ``chain``: one needle names the
    place for which another one has the number."""


class LongEvalConfig(Section):
    """LongEval (Li et al. 2023): find one of many numbered lines, or the first topic of a long conversation."""

    lengths: Lengths | None = None
    """Prompt lengths in tokens at most; null means those of passkey."""
    num_trials: int = Field(default=5, gt=0)
    """Prompts per length."""


class TopicsConfig(LongEvalConfig):
    """The first topic of a long conversation."""

    conversations: list[str] = []
    """Test files of LongEval (``N_topics.jsonl``); empty means conversations of our own, over `haystack`."""


class RulerConfig(Section):
    """The 11 synthetic tasks of RULER (Hsieh et al. 2024) that need no data but a text."""

    tasks: Annotated[list[RulerTask], Field(min_length=1)] = list(RulerTask.__args__)  # type: ignore[attr-defined]
    """Which of them."""
    lengths: Lengths | None = None
    """Prompt with answer, in tokens at most; null means those of passkey."""
    num_samples: int = Field(default=5, gt=0)
    """Prompts per task and length (500 in the paper)."""
    chat_template: bool = False
    """Put the question into the tokenizer's chat template, with the beginning of the answer behind it."""
    threshold: float = Field(default=85.6, gt=0, le=100)
    """Score from which on a length counts as effective: Llama-2-7B-chat's at 4k in the paper."""


class QuestionsConfig(Section):
    """Questions about documents, asked in the chat template of ``data.instruct``: exact match and F1 (SQuAD)."""

    files: list[str] = []
    """Held-out questions, in any format of instructions; what ``longlora data longqa`` holds out is also shown by task
    and depth. Empty means `data.heldout`, where that holds instructions."""
    num_questions: int = Field(default=40, gt=0)
    """Questions of each length that are asked, drawn by `seed`."""
    max_new_tokens: int = Field(default=128, gt=0)
    """Tokens of an answer at most."""


class EvalConfig(Section):
    """What is measured, always with full attention, for base, RoPE rescaled only, and trained."""

    variants: Annotated[list[Variant], Field(min_length=1)] = ["base", "rope_only", "trained"]
    """What is measured: the model as it came, with RoPE rescaled only, and trained."""
    tasks: Annotated[list[Task], Field(min_length=1)] = ["perplexity", "passkey"]
    """What is measured of each; standard benchmarks are another command, ``longlora eval harness``."""
    perplexity: PerplexityConfig = Field(default_factory=PerplexityConfig)
    longppl: LongPPLConfig = Field(default_factory=LongPPLConfig)
    passkey: PasskeyConfig = Field(default_factory=PasskeyConfig)
    needle: NeedleConfig = Field(default_factory=NeedleConfig)
    lines: LongEvalConfig = Field(default_factory=LongEvalConfig)
    topics: TopicsConfig = Field(default_factory=TopicsConfig)
    ruler: RulerConfig = Field(default_factory=RulerConfig)
    questions: QuestionsConfig = Field(default_factory=QuestionsConfig)
    haystack: list[str] = []
    """Text files in which needles are hidden; empty means the held-out documents."""
    prefill_chunk_tokens: int = Field(default=2048, gt=0)
    """Tokens per forward pass when a long prompt is read into the KV cache."""
    batch_tokens: int = Field(default=8192, gt=0)
    """Tokens of short prompts that are read side by side at most; 1 reads each by itself and shares what is common."""
    seed: int = Field(default=0, ge=0)
    """Choice of hidden numbers, words and places."""

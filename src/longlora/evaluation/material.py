"""What every variant of a run is asked: documents to read and prompts to answer, made from the recipe alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from longlora.artifacts import RunFolder
from longlora.config import Recipe
from longlora.data.documents import ReadReport
from longlora.data.shards import bound_tokens, open_shard
from longlora.errors import DataError
from longlora.evaluation.loss.longppl import least_tokens
from longlora.evaluation.loss.perplexity import first_window, needed_tokens
from longlora.evaluation.loss.texts import NamedTokens, read_haystack, read_texts
from longlora.evaluation.retrieval.longeval import conversation_prompts, line_prompts, load_topics, topic_prompts
from longlora.evaluation.retrieval.needle import needle_prompts
from longlora.evaluation.retrieval.passkey import Hidden, filler_prompts, hide_facts, landmark_prompts
from longlora.evaluation.retrieval.prompt import Encode, Prompt
from longlora.evaluation.retrieval.questions import question_prompts
from longlora.evaluation.retrieval.ruler import ruler_prompts
from longlora.evaluation.retrieval.ruler_needles import NEEDLE_TASKS
from longlora.model.build import load_config, tokenizer_hash


@dataclass(frozen=True)
class Text:
    """A document as it is read: with hidden numbers or as it is."""

    name: str
    hidden: Hidden

    def prompts(self) -> list[Prompt]:
        """The questions about hidden numbers, each with all that is read before it."""
        return [
            Prompt(
                tokens=(*self.hidden.tokens[: question.position], *question.tokens),
                references=(str(facts["key"]),),
                metric="first_integer",
                answer=question.answer,
                facts={name: value for name, value in facts.items() if name != "key"} | {"document": self.name},
            )
            for question, facts in zip(self.hidden.questions, self.hidden.facts, strict=True)
        ]


@dataclass(frozen=True)
class Material:
    """Everything that is asked of a model; the same for every variant."""

    documents: list[Text]
    """Read from their beginning for their loss, and for the numbers hidden in them."""
    plain: list[NamedTokens]
    """The documents of LongPPL: the same ones without what was hidden, as far as it reads them."""
    prompts: list[Prompt]
    """Answered, in the order of `recipe.eval.tasks`."""

    def asked(self) -> list[Prompt]:
        """`prompts`, and the questions about numbers hidden in `documents`."""
        return [*self.prompts, *(prompt for text in self.documents for prompt in text.prompts())]


def build_material(
    recipe: Recipe,
    run: RunFolder,
    tokenizer: PreTrainedTokenizerBase,
    context_lengths: Sequence[int],
    longppl_context: int,
    console: Console,
) -> Material:
    """Documents and prompts of `recipe`.

    Args:
        context_lengths: windows in which the loss is measured, in tokens.
        longppl_context: tokens of a document that LongPPL reads at most.
        console: is told what was read of files that the recipe names.

    Raises:
        DataError: no document is long enough, a length has no room for its task, or there is nothing to measure.
    """
    settings, own = recipe.eval, recipe.eval.perplexity
    scores = "perplexity" in settings.tasks or _hides(recipe)
    hides_needles = _needs_haystack(recipe)
    windows = 0
    if scores or (hides_needles and not settings.haystack):
        windows = needed_tokens(own.protocol, context_lengths, own.stride, own.tokens_per_document)
    most = max(windows, longppl_context if "longppl" in settings.tasks else 0)
    plain = _documents(recipe, run, tokenizer, windows, most, console) if most else []
    cut = [NamedTokens(text.name, text.tokens[:windows]) for text in plain]
    texts: dict[str, str] = {}
    if hides_needles and settings.haystack:
        texts = read_haystack(settings.haystack, text_field=recipe.data.text_field)
    elif hides_needles:
        texts = {text.name: tokenizer.decode(text.tokens, skip_special_tokens=True) for text in cut}
    documents = _hidden(recipe, cut, tokenizer, context_lengths) if scores else []
    prompts = _prompts(recipe, tokenizer, texts, console)
    if not (documents or plain or prompts):
        raise DataError(
            "nothing is left to measure, because eval.passkey.num_trials=0 leaves passkey out: raise it, or name other "
            "eval.tasks"
        )
    return Material(documents, plain, prompts)


def retrieval_lengths(recipe: Recipe, lengths: list[int] | None) -> list[int]:
    """Lengths of a retrieval task: its own, those of passkey, or the quarters of the context."""
    context = recipe.context.context_length
    return lengths or recipe.eval.passkey.lengths or [context * quarter // 4 for quarter in (1, 2, 3, 4)]


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Text to ids without what the tokenizer puts around a text."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    return encode


def _hides(recipe: Recipe) -> bool:
    passkey = recipe.eval.passkey
    return "passkey" in recipe.eval.tasks and passkey.num_trials > 0 and passkey.haystack == "heldout"


def _needs_haystack(recipe: Recipe) -> bool:
    """Whether a task hides something in real text."""
    settings = recipe.eval
    essay = any(task in NEEDLE_TASKS and NEEDLE_TASKS[task].haystack == "essay" for task in settings.ruler.tasks)
    over_text = {"needle": True, "topics": not settings.topics.conversations, "ruler": essay}
    return any(over_text.get(task, False) for task in settings.tasks)


def _documents(
    recipe: Recipe,
    run: RunFolder,
    tokenizer: PreTrainedTokenizerBase,
    windows: int,
    most: int,
    console: Console,
) -> list[NamedTokens]:
    """The first documents of `windows` tokens or more (0: as many as LongPPL needs), cut to `most` tokens."""
    settings = recipe.eval.perplexity
    needed = windows or least_tokens(recipe.eval.longppl)
    too_long = "eval.perplexity.context_lengths" if windows else "eval.longppl.short_context"
    if settings.texts:
        report = ReadReport()
        found = read_texts(
            settings.texts,
            tokenizer,
            text_field=recipe.data.text_field,
            add_special_tokens=recipe.data.add_special_tokens,
            needed_tokens=needed,
            max_tokens=most,
            max_documents=settings.max_documents,
            whole_streams=settings.protocol == "longlora",
            report=report,
            too_long=too_long,
        )
        console.print(f"texts: {report.summary()}", highlight=False)
        for text in found:
            if text.note:
                console.print(f"{text.name}: {text.note}", highlight=False)
        return found
    if recipe.data.kind == "instruct":
        raise DataError(
            "data.heldout holds instructions, whose loss and length say little of a context: name texts in "
            "eval.perplexity.texts (eval.haystack for needles), or take eval.tasks=[questions]"
        )
    vocabulary = load_config(recipe.model).get_text_config().vocab_size  # an id beyond it has no embedding
    shard = open_shard(run.heldout_shard, tokenizer_hash(tokenizer), vocabulary=vocabulary)
    long_enough = [index for index, length in enumerate(shard.lengths) if length >= needed]
    if not long_enough:
        raise DataError(
            f"no held-out document has {needed} tokens, the longest has {max(shard.lengths)}: "
            f"add longer ones to data.heldout or lower {too_long}"
        )
    kept = long_enough[: settings.max_documents]
    return [NamedTokens(shard.names[index], shard.document(index)[:most].tolist()) for index in kept]


def _hidden(
    recipe: Recipe, plain: list[NamedTokens], tokenizer: PreTrainedTokenizerBase, context_lengths: Sequence[int]
) -> list[Text]:
    passkey, settings = recipe.eval.passkey, recipe.eval.perplexity
    if not _hides(recipe):
        return [Text(text.name, Hidden(list(text.tokens), [True] * len(text.tokens), [], [])) for text in plain]
    lengths = retrieval_lengths(recipe, passkey.lengths)
    read_tokens = first_window(context_lengths, settings.tokens_per_document, settings.protocol)
    if max(lengths) > read_tokens:
        raise DataError(
            f"eval.passkey.lengths {max(lengths)} is longer than the {read_tokens} tokens that are read of each "
            "held-out document: raise eval.perplexity.context_lengths or take eval.passkey.haystack=filler"
        )
    encode = encoder(tokenizer)
    return [
        Text(text.name, hide_facts(encode, text.tokens, lengths, passkey.depths, trial, recipe.eval.seed))
        for trial, text in enumerate(plain)
    ]


def _prompts(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], console: Console
) -> list[Prompt]:
    """Prompts of all tasks, in the order of `recipe.eval.tasks`."""
    settings, seed = recipe.eval, recipe.eval.seed
    encode = encoder(tokenizer)
    before, _ = bound_tokens(tokenizer)
    made: list[Prompt] = []
    for task in settings.tasks:
        match task:
            case "passkey" if settings.passkey.num_trials and not _hides(recipe):
                own = settings.passkey
                lengths = retrieval_lengths(recipe, own.lengths)
                if own.haystack == "landmark":
                    made += landmark_prompts(encode, before, lengths, own.num_trials, seed)
                else:
                    made += filler_prompts(encode, before, lengths, own.depths, own.num_trials, seed)
            case "needle":
                needle = settings.needle
                lengths = retrieval_lengths(recipe, needle.lengths)
                made += needle_prompts(
                    encode, before, texts, lengths, needle.depths, needle.num_trials, seed,
                    distractors=needle.distractors, names=needle.kinds,
                )  # fmt: skip
            case "lines":
                lengths = retrieval_lengths(recipe, settings.lines.lengths)
                made += line_prompts(encode, before, lengths, settings.lines.num_trials, seed)
            case "topics":
                made += _topics(recipe, encode, before, texts)
            case "ruler":
                wrap = chat_wrap(tokenizer) if settings.ruler.chat_template else None
                lengths = retrieval_lengths(recipe, settings.ruler.lengths)
                made += ruler_prompts(encode, [] if wrap else before, texts, settings.ruler, lengths, seed, wrap)
            case "questions":
                made += _questions(recipe, tokenizer, console)
    return made


def _topics(recipe: Recipe, encode: Encode, before: Sequence[int], texts: Mapping[str, str]) -> list[Prompt]:
    settings, seed = recipe.eval.topics, recipe.eval.seed
    if settings.conversations:
        found = [each for path in settings.conversations for each in load_topics(Path(path))]
        return conversation_prompts(encode, before, found, seed)
    lengths = retrieval_lengths(recipe, settings.lengths)
    return topic_prompts(encode, before, texts, lengths, settings.num_trials, seed)


def _questions(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, console: Console) -> list[Prompt]:
    settings = recipe.eval.questions
    held_out = recipe.data.heldout if recipe.data.kind == "instruct" else []
    sources = settings.files or held_out
    if not sources:
        raise DataError("eval.tasks has questions and there are none: name files in eval.questions.files")
    return question_prompts(
        tokenizer,
        sources,
        recipe.data.instruct,
        per_length=settings.num_questions,
        max_new_tokens=settings.max_new_tokens,
        seed=recipe.eval.seed,
        say=lambda line: console.print(line, highlight=False, markup=False),
    )


def chat_wrap(tokenizer: PreTrainedTokenizerBase) -> Callable[[str, str], str]:
    """Question and beginning of an answer -> text in the chat template, its special tokens written out.

    Raises:
        DataError: the tokenizer has none.
    """
    if not tokenizer.chat_template:
        raise DataError("eval.ruler.chat_template=true: the tokenizer has no chat template, set it to false")

    def wrap(question: str, prefix: str) -> str:
        messages = [{"role": "user", "content": question}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)) + prefix

    return wrap

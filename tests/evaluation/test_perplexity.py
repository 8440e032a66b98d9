"""Three protocols against naive loops, hand-computed values and a model of known loss; bytes of split characters."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import VOCABULARY, word_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from longlora.errors import DataError
from longlora.evaluation.loss.perplexity import (
    Window,
    byte_counter,
    document_rows,
    first_window,
    longlora_windows,
    needed_tokens,
    press_windows,
)
from longlora.evaluation.reading.stream import read
from longlora.model.head import output_head

MIXED = "Ahab saw 🐋🐋 and cried: 鯨が出た! naïve ☃ end"


@given(st.integers(2, 300), st.integers(2, 64), st.integers(1, 64))
def test_press_scores_every_token_but_the_first_once(tokens: int, context: int, stride: int) -> None:
    scored = [0] * tokens
    for window in press_windows(tokens, context, stride):
        assert 0 <= window.start < window.stop <= tokens
        assert window.stop - window.start <= context
        assert len(range(window.start, window.stop)) == min(context, tokens)
        assert window.first_scored > window.start
        for position in range(window.first_scored, window.stop):
            scored[position] += 1
    assert scored == [0] + [1] * (tokens - 1)


def test_a_stride_of_one_gives_every_token_a_full_window() -> None:
    windows = press_windows(10, 4, 1)
    assert windows[0] == Window(0, 4, 1)
    assert windows[1:] == [Window(stop - 4, stop, stop - 1) for stop in range(5, 11)]


def test_disjoint_windows_overlap_by_the_token_that_nothing_predicts() -> None:
    rows, _ = document_rows("d", fake_losses(0, 3), [True] * 9, [3], None, 9, fake_losses)
    assert rows[0]["tokens"] == 8
    # Windows 0-3, 2-5, 4-7, 6-9: each scores its last two tokens.
    expected = [position + (0.01 if position % 2 else 0.02) for position in range(1, 9)]
    assert rows[0]["loss"] == pytest.approx(sum(expected) / 8)


def fake_losses(start: int, stop: int) -> torch.Tensor:
    """The loss of a token is its position in the document plus a hundredth of the context it is given."""
    position = torch.arange(start, stop).float()
    losses = position + (position - start) / 100
    losses[0] = torch.nan
    return losses


def test_rows_and_positions() -> None:
    calls = []

    def losses_of(start: int, stop: int) -> torch.Tensor:
        calls.append((start, stop))
        return fake_losses(start, stop)

    scored = [True] * 3000
    scored[5] = False
    rows, positions = document_rows("d", fake_losses(0, 2048), scored, [1000, 2048], None, None, losses_of)
    long, short = rows
    assert not calls, "the shorter window begins where the longer one does and is not read again"
    counted = [p for p in range(1, 2048) if p != 5]
    assert long["tokens"] == len(counted)
    assert long["loss"] == pytest.approx(sum(p * 1.01 for p in counted) / len(counted))
    assert long["tail_tokens"] == 1024
    assert long["tail_loss"] == pytest.approx(sum(p * 1.01 for p in range(1024, 2048)) / 1024)
    assert long["protocol"] == "press"
    assert long["bytes"] is None
    counted = [p for p in range(1, 1000) if p != 5]
    assert short["loss"] == pytest.approx(sum(p * 1.01 for p in counted) / len(counted))
    assert short["tail_tokens"] == len(counted)
    assert [(row["start"], row["stop"], row["tokens"]) for row in positions] == [(0, 1024, 1022), (1024, 2048, 1024)]


def test_strided_windows_over_more_of_the_document() -> None:
    rows, _ = document_rows("d", fake_losses(0, 4), [True] * 12, [4], 2, 12, fake_losses)
    # Windows 0-4, 2-6, 4-8, 6-10, 8-12; the first scores 1 to 3, the others their last two.
    expected = [1.01, 2.02, 3.03] + [position + 0.02 + (position % 2) / 100 for position in range(4, 12)]
    assert rows[0]["tokens"] == 11
    assert rows[0]["loss"] == pytest.approx(sum(expected) / 11)


@pytest.mark.parametrize("protocol", ["press", "longlora", "truncate"])
def test_a_model_of_uniform_logits_has_the_loss_log_v(tiny_llama: LlamaForCausalLM, protocol: str) -> None:
    torch.nn.init.zeros_(tiny_llama.lm_head.weight)  # tied with the embedding
    rows, positions = measure(tiny_llama, text(60), [16, 32], 8, 60, protocol)
    assert len(rows) == 2
    for row in [*rows, *positions]:
        assert row["loss"] == pytest.approx(math.log(VOCABULARY), rel=1e-7)
        assert math.exp(row["loss"]) == pytest.approx(VOCABULARY, rel=1e-6)


def test_press_with_stride_one_equals_a_loop_over_tokens(tiny_llama: LlamaForCausalLM) -> None:
    tokens, context = text(20), 6
    rows, _ = measure(tiny_llama, tokens, [context], 1, len(tokens), "press")
    losses = [loss_after(tiny_llama, tokens[max(0, t + 1 - context) : t], tokens[t]) for t in range(1, len(tokens))]
    assert rows[0]["tokens"] == len(losses)
    assert rows[0]["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_press_with_the_context_as_stride_equals_disjoint_chunks(tiny_llama: LlamaForCausalLM) -> None:
    tokens, context = text(36), 8
    rows, _ = measure(tiny_llama, tokens, [context], None, len(tokens), "press")
    # Chunks share one token, which is the context of the next chunk's first prediction and is scored in the one before.
    chunks = [tokens[start : start + context] for start in range(0, len(tokens) - 1, context - 1)]
    assert [len(chunk) for chunk in chunks] == [8, 8, 8, 8, 8]
    losses = [loss_after(tiny_llama, chunk[:t], chunk[t]) for chunk in chunks for t in range(1, len(chunk))]
    assert rows[0]["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_longlora_equals_a_direct_reimplementation_of_the_original(tiny_llama: LlamaForCausalLM) -> None:
    tokens, context, stride = text(61), 16, 5
    rows, _ = measure(tiny_llama, tokens, [context], stride, len(tokens), "longlora")
    # get_as_batch and evaluate of the original's eval.py, one window a batch.
    starts = list(range(0, len(tokens) - context, stride))
    starts.pop()
    losses = []
    for start in starts:
        ids = torch.tensor(tokens[start : start + context])[None]
        with torch.no_grad():
            losses.append(tiny_llama(input_ids=ids, labels=ids, use_cache=False).loss.item())
    assert len(losses) == 8
    assert rows[0]["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert rows[0]["tokens"] == 8 * (context - 1)
    assert (rows[0]["stride"], rows[0]["protocol"]) == (stride, "longlora")


@given(st.integers(1, 3000), st.integers(2, 500), st.integers(1, 300))
def test_longlora_windows_are_those_of_the_original(tokens: int, context: int, stride: int) -> None:
    starts = list(range(0, tokens - context, stride))[:-1]
    windows = longlora_windows(tokens, context, stride)
    assert windows == [Window(start, start + context, start + 1) for start in starts]
    assert all(window.stop + 1 <= tokens for window in windows)


def test_longlora_has_a_stride_of_256_and_one_window_unless_told_otherwise() -> None:
    rows, _ = document_rows("d", fake_losses(0, 300), [True] * 900, [300], None, None, fake_losses, protocol="longlora")
    assert (rows[0]["stride"], rows[0]["tokens"]) == (256, 299)
    rows, _ = document_rows("d", fake_losses(0, 300), [True] * 900, [300], None, 900, fake_losses, protocol="longlora")
    assert rows[0]["tokens"] == 2 * 299  # 0 and 256; the one at 512 is dropped


def test_longlora_refuses_a_document_without_a_window() -> None:
    with pytest.raises(DataError, match=r"document d has 40 tokens: protocol longlora needs 62 .* of 57") as raised:
        document_rows("d", fake_losses(0, 40), [True] * 40, [57], 4, None, fake_losses, protocol="longlora")
    assert "\n" not in str(raised.value)


def test_truncate_is_the_first_window_whatever_else_is_there() -> None:
    rows, _ = document_rows("d", fake_losses(0, 9), [True] * 50, [5, 9], 2, 50, fake_losses, protocol="truncate")
    for row, context in zip(rows, [9, 5], strict=True):
        assert (row["context_length"], row["tokens"], row["stride"]) == (context, context - 1, context)
        assert row["loss"] == pytest.approx(sum(p * 1.01 for p in range(1, context)) / (context - 1))


def test_tokens_that_a_document_needs_and_that_are_read_first() -> None:
    assert needed_tokens("press", [8, 32], None, None) == 32
    assert needed_tokens("press", [8, 32], 4, 100) == 100
    assert needed_tokens("truncate", [8, 32], 4, 100) == 32
    assert needed_tokens("longlora", [8, 32], None, None) == 32 + 256 + 1
    assert needed_tokens("longlora", [8, 32], 4, 100) == 100
    assert len(longlora_windows(needed_tokens("longlora", [32], 4, None), 32, 4)) == 1
    with pytest.raises(DataError, match="tokens_per_document 36: protocol longlora needs 37"):
        needed_tokens("longlora", [32], 4, 36)
    assert first_window([8, 32], 16) == 16
    assert first_window([8, 32], None) == 32
    assert first_window([8, 32], 16, "truncate") == 32


def test_a_document_of_planted_tokens_alone_is_refused() -> None:
    with pytest.raises(DataError, match="document d has no token that counts"):
        document_rows("d", fake_losses(0, 5), [False] * 5, [5], None, None, fake_losses)


def text(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


def measure(
    model: LlamaForCausalLM, tokens: list[int], contexts: list[int], stride: int | None, total: int, protocol: str
) -> tuple[list[dict], list[dict]]:
    def losses_of(start: int, stop: int) -> torch.Tensor:
        return read(model, output_head(model), tokens[start:stop], chunk_tokens=64).losses_T

    first = losses_of(0, max(contexts))
    return document_rows("d", first, [True] * len(tokens), contexts, stride, total, losses_of, protocol=protocol)


def loss_after(model: LlamaForCausalLM, context: list[int], token: int) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(context)[None], use_cache=False).logits[0, -1]
    return -logits.float().log_softmax(-1)[token].item()


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes of a text, some joined, as GPT-2 and Llama 3 have them: a character is several tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *letters, "Ġa", "nd", "Ġand"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "a"), ("n", "d"), ("Ġa", "nd")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def byte_fallback(known: str = "abcdefghijklmnopqrstuvwxyzAï☃") -> PreTrainedTokenizerFast:
    """Characters, and bytes where a character is unknown, as Llama 2 has them; a first space is added and dropped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *known, "▁a"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def raw_bytes(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> list[int]:
    """Bytes of the first n tokens for each n, also of incomplete characters, from the vocabulary itself."""
    counts, levels = [0], isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)
    for piece in tokenizer.convert_ids_to_tokens(tokens):
        if piece in ("<s>", "</s>"):
            size = 0
        elif levels:
            size = len(piece)
        else:
            size = 1 if piece.startswith("<0x") else len(piece.replace("▁", " ").encode())
        counts.append(counts[-1] + size)
    return counts if levels else [max(0, count - 1) for count in counts]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("content", [MIXED, MIXED * 3, "🐋🐋🐋鯨鯨" * 4, "  and two", "🐋"])
def test_bytes_count_characters_with_the_token_that_completes_them(make: object, content: str) -> None:
    tokenizer = make()
    tokens = [tokenizer.bos_token_id, *tokenizer(content, add_special_tokens=False).input_ids]
    assert len(tokens) > len(content) or "🐋" not in content, "characters are split over tokens"
    count = byte_counter(tokenizer, tokens, [True] * len(tokens))
    assert count is not None
    raw, encoded = raw_bytes(tokenizer, tokens), content.encode()
    assert raw[-1] == len(encoded)
    for position in range(len(tokens) + 1):
        complete = encoded[: raw[position]].decode("utf-8", "ignore").encode()
        assert count(position) == len(complete), position


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_bytes_add_up_in_a_text_with_a_genuine_replacement_character(make: object) -> None:
    tokenizer, content = make(), "a \ufffd\ufffd genuine one, and 🐋"
    tokens = tokenizer(content, add_special_tokens=False).input_ids
    count = byte_counter(tokenizer, tokens, [True] * len(tokens))
    assert count is not None
    counts = [count(position) for position in range(len(tokens) + 1)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, len(content.encode()))


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_bytes_of_a_document_that_is_cut_in_a_character(make: object) -> None:
    tokenizer = make()
    content = MIXED + " 鯨鯨"
    tokens = tokenizer(content, add_special_tokens=False).input_ids
    for cut in range(5):
        count = byte_counter(tokenizer, tokens[: len(tokens) - cut], [True] * (len(tokens) - cut))
        assert count is not None
        missing = 0 if cut == 0 else 3 if cut <= 3 else 6
        assert count(len(tokens) - cut) == len(content.encode()) - missing


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_planted_tokens_have_no_bytes_wherever_they_stand(make: object) -> None:
    tokenizer = make()
    tokens = tokenizer(MIXED, add_special_tokens=False).input_ids
    planted = tokenizer("\nThe pass key is 7. 🐋", add_special_tokens=False).input_ids
    plain = byte_counter(tokenizer, tokens, [True] * len(tokens))
    for place in range(len(tokens) + 1):
        scored = [True] * place + [False] * len(planted) + [True] * (len(tokens) - place)
        count = byte_counter(tokenizer, [*tokens[:place], *planted, *tokens[place:]], scored)
        assert count is not None
        assert count(place) == count(place + len(planted)) == plain(place)
        assert count(len(scored)) == len(MIXED.encode())


def test_bytes_are_unknown_where_the_text_cannot_be_had_back() -> None:
    # Without a decoder, tokens are joined with spaces.
    rules = json.loads(word_tokenizer().backend_tokenizer.to_str()) | {"decoder": None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules)))
    tokens = tokenizer("abcdefghijklmnopqrst", add_special_tokens=False).input_ids
    assert byte_counter(tokenizer, tokens, [True] * len(tokens)) is None
    # These tokens are not what the tokenizer makes of their text.
    tokenizer = byte_level()
    tokens = tokenizer(" and x" * 5 + "abcdefgh", add_special_tokens=False).input_ids
    split = tokenizer.convert_tokens_to_ids(["Ġa", "nd"])
    assert byte_counter(tokenizer, tokens, [True] * len(tokens)) is not None
    assert byte_counter(tokenizer, [*split, *tokens[1:]], [True] * (len(tokens) + 1)) is None
    # An unknown token stands for any text.
    tokenizer = byte_fallback()
    tokens = tokenizer("and a few more letters", add_special_tokens=False).input_ids
    assert byte_counter(tokenizer, tokens, [True] * len(tokens)) is not None
    assert byte_counter(tokenizer, [*tokens, tokenizer.unk_token_id], [True] * (len(tokens) + 1)) is None


@pytest.mark.parametrize(("context", "stride"), [(8, None), (8, 1), (8, 3), (30, 7), (64, None)])
def test_bytes_of_press_rows_do_not_depend_on_windows(context: int, stride: int | None) -> None:
    tokenizer = byte_level()
    tokens = tokenizer(MIXED, add_special_tokens=False).input_ids
    counter = byte_counter(tokenizer, tokens, [True] * len(tokens))
    rows, _ = document_rows(
        "d",
        fake_losses(0, min(context, len(tokens))),
        [True] * len(tokens),
        [context],
        stride,
        len(tokens),
        fake_losses,
        bytes_until=counter,
    )
    assert rows[0]["tokens"] == len(tokens) - 1
    assert rows[0]["bytes"] == len(MIXED.encode()) - 1  # nothing predicts the first token, "A"


def test_bytes_of_longlora_rows_count_as_often_as_their_tokens() -> None:
    tokenizer, context, stride = byte_level(), 9, 4
    tokens = tokenizer(MIXED, add_special_tokens=False).input_ids
    counter = byte_counter(tokenizer, tokens, [True] * len(tokens))
    rows, _ = document_rows(
        "d",
        fake_losses(0, context),
        [True] * len(tokens),
        [context],
        stride,
        len(tokens),
        fake_losses,
        protocol="longlora",
        bytes_until=counter,
    )
    windows = longlora_windows(len(tokens), context, stride)
    assert len(windows) > 5
    assert rows[0]["bytes"] == sum(counter(w.start + context) - counter(w.start + 1) for w in windows)


def test_a_uniform_model_of_bytes_needs_eight_bits_a_byte() -> None:
    tokenizer = byte_level()
    tokens = tokenizer("xyz " * 10, add_special_tokens=False).input_ids
    losses = torch.full((len(tokens),), math.log(256))
    losses[0] = torch.nan
    counter = byte_counter(tokenizer, tokens, [True] * len(tokens))
    rows, _ = document_rows(
        "d", losses, [True] * len(tokens), [40], None, None, lambda start, stop: losses, bytes_until=counter
    )
    row = rows[0]
    assert row["loss"] * row["tokens"] / math.log(2) / row["bytes"] == pytest.approx(8)


def test_a_stride_beyond_a_context_is_that_context() -> None:
    rows, _ = document_rows("d", fake_losses(0, 8), [True] * 8, [4, 8], 6, 8, fake_losses)
    assert [(row["context_length"], row["stride"], row["tokens"]) for row in rows] == [(8, 6, 7), (4, 4, 7)]

"""`benchmarks/compare_original.py` on a stand-in of the original that is written here, right and wrong by one token.

The original itself is not here; what it gives is in benchmarks/results/original.csv.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

STAND_IN = """
import torch
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

BACK = 0  # tokens by which the roll goes back too far
LIMIT = 0  # where bounds of every row end, 0: where the row ends


def project(layer, hidden, positions):
    size = (*hidden.shape[:2], -1, layer.head_dim)
    q, k, v = (linear(hidden).view(size).transpose(1, 2) for linear in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = apply_rotary_pos_emb(q, k, *layer.rotary_emb(v, seq_len=hidden.shape[1]), positions)
    return q, repeat_kv(k, layer.num_key_value_groups), repeat_kv(v, layer.num_key_value_groups)


def forward_noflashattn(layer, hidden_states, attention_mask=None, position_ids=None):
    B, T, _ = hidden_states.shape
    group, half = T // 4, layer.num_heads // 2

    def groups(x):
        x = torch.cat([x[:, :half], x[:, half:].roll(-(group // 2), 2)], 1)
        return x.unflatten(2, (4, group)).transpose(1, 2)

    q, k, v = (groups(x) for x in project(layer, hidden_states, position_ids))
    scores = q @ k.transpose(-1, -2) * layer.head_dim**-0.5 + attention_mask[:, None, :, :group, :group]
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2, 3)
    out = torch.cat([out[:, :half], out[:, half:].roll(group // 2 + BACK, 2)], 1)
    return layer.o_proj(out.transpose(1, 2).flatten(2)), None, None


def forward_flashattn(layer, hidden_states, attention_mask=None, position_ids=None):
    B, T, _ = hidden_states.shape
    group, half = T // 4, layer.num_heads // 2
    qkv = torch.stack(project(layer, hidden_states, position_ids), 2).transpose(1, 3)
    rows = torch.stack([qkv[:, :, :, :half], qkv[:, :, :, half:]], 1).flatten(0, 1)
    x, places, bounds, longest = unpad_input(rows, attention_mask.repeat_interleave(2, 0))
    cuts = [bounds[:1]]
    for row in range(2 * B):
        first = group // 2 + BACK if row % 2 else group
        inner = torch.arange(bounds[row] + first, LIMIT or int(bounds[row + 1]), group, dtype=bounds.dtype)
        cuts += [inner, bounds[row + 1 : row + 2]]
    out = flash_attn_varlen_qkvpacked_func(x, torch.cat(cuts), group, 0.0, softmax_scale=None, causal=True)
    out = pad_input(out, places, 2 * B, T).unflatten(0, (B, 2)).transpose(1, 2).flatten(2, 3)
    return layer.o_proj(out.flatten(2)), None, None
"""
FILE = "llama_attn_replace.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("compare_original")


def write(folder: Path, text: str = STAND_IN) -> Path:
    (folder / FILE).write_text(text, encoding="utf-8")
    return folder / FILE


def rows_of(script: ModuleType, path: Path, *, longest: int = 64) -> list[dict[str, str]]:
    original = script.load_original(path)
    return [script.compare(original, case) for case in script.cases(FILE) if case.tokens <= longest]


def chosen(rows: list[dict[str, str]], path: str, ours: str, heads: int = 4) -> dict[str, dict[str, str]]:
    """Rows of one path of the original and one mode of ours, by lengths."""
    return {
        row["lengths"]: row for row in rows if (row["path"], row["ours"], row["query_heads"]) == (path, ours, heads)
    }


@pytest.mark.usefixtures("one_thread")
def test_a_right_original_agrees_and_the_roll_lets_the_end_through(script: ModuleType, tmp_path: Path) -> None:
    rows = rows_of(script, write(tmp_path))
    rolled, cut, leaking = (
        chosen(rows, *which) for which in (("no flash", "wraparound"), ("flash", "default"), ("no flash", "default"))
    )
    for lengths in ("64", "64 64", "59"):
        assert rolled[lengths]["outcome"] == "agree", rolled[lengths]
        assert cut[lengths]["outcome"] == "agree", cut[lengths]
        assert float(cut[lengths]["gradient_rel"]) < 1e-5
    assert cut["48 64"]["outcome"] == "agree"
    assert (leaking["64 64"]["outcome"], leaking["64 64"]["where"]) == ("differ", "rows 0-1, heads 2-3, tokens 0-7")
    assert chosen(rows, "flash", "default", heads=8)["64 64"]["outcome"] == "agree"
    assert cut["60"]["outcome"] == "ours refuses"
    assert "group_size=15" in cut["60"]["where"]


@pytest.mark.usefixtures("one_thread")
def test_an_original_that_is_wrong_by_one_token_differs(script: ModuleType, tmp_path: Path) -> None:
    rows = rows_of(script, write(tmp_path, STAND_IN.replace("BACK = 0", "BACK = 1")))
    for which in (("no flash", "wraparound"), ("flash", "default")):
        row = chosen(rows, *which)["64"]
        assert row["outcome"] == "differ"
        assert float(row["output_rel"]) > 0.01
        assert "heads 2-3" in row["where"]


@pytest.mark.usefixtures("one_thread")
def test_bounds_that_mean_nothing_to_the_kernel_are_said(script: ModuleType, tmp_path: Path) -> None:
    rows = rows_of(script, write(tmp_path, STAND_IN.replace("LIMIT = 0", "LIMIT = 64")))
    row = chosen(rows, "flash", "default")["51"]
    assert row["outcome"] == "undefined in flash-attn"
    assert row["where"].startswith("cu_seqlens")


def test_places_are_named(script: ModuleType) -> None:
    places = script.torch.zeros(2, 12, 4, dtype=script.torch.bool)
    assert script.named(places) == ""
    places[1, 2:5, 3] = places[1, 9, 3] = True
    assert script.named(places) == "rows 1, heads 3, tokens 2-4 9"
    places[0, 2, 3] = True
    assert script.named(places) == "62.5% of rows 0-1, heads 3, tokens 2-4 9"


@pytest.mark.usefixtures("one_thread")
def test_the_script_hands_over_rows_with_times(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path)
    few = [case for case in script.cases(FILE) if case.tokens == 64][:3]
    written: list[tuple[str, list[dict[str, str]]]] = []
    monkeypatch.setattr(script, "cases", lambda file: few)
    monkeypatch.setattr(script, "append_rows", lambda name, rows, device: written.append((name, rows)))
    arguments = ["compare_original.py", "--original", str(tmp_path), "--timed-tokens", "64", "--repeats", "2"]
    monkeypatch.setattr("sys.argv", arguments)
    script.main()
    [(name, rows)] = written
    assert name == "original"
    assert [row["outcome"] for row in rows] == ["agree", "agree", "differ", *["timed"] * 6]
    assert len({tuple(row) for row in rows}) == 1  # the columns of one table
    assert all(float(row["original / ours"]) > 0 for row in rows[3:])
    assert "no flash  wraparound  agree  1" in capsys.readouterr().out


def test_a_path_without_the_original_is_one_line(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is none of llama_attn_replace.py"):
        script.files_of(tmp_path)


def test_a_package_that_is_missing_is_one_line(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "import no_such_package\n")
    monkeypatch.setattr("sys.argv", ["compare_original.py", "--original", str(tmp_path)])
    with pytest.raises(SystemExit, match="imports no_such_package, which is not here: pip install no_such_package"):
        script.main()

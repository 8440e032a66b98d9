"""Recipes: overrides, hints, and that every setting is used somewhere."""

import ast
from pathlib import Path

import pytest

from longlora.config import Recipe, build_recipe, dump_recipe, load_recipe
from longlora.errors import LongLoraError
from longlora.hints import leaf_keys

SOURCE = Path(__file__).parent.parent / "src" / "longlora"
MINIMAL = {"run_dir": "r", "model": {"name_or_path": "m"}, "context": {"context_length": 100}}


RATIO = ["attention.group_size=null"]


def minimal(**changes: object) -> dict[str, object]:
    return {**MINIMAL, **changes}


def test_overrides_and_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("run_dir: a\nmodel: {name_or_path: m}\ncontext: {context_length: 1000}\n", encoding="utf-8")
    recipe = load_recipe(
        path,
        ["train.steps=20", "train.learning_rate=3e-4", "attention.group_size=null", "attention.group_size_ratio=0.25"],
    )
    assert (recipe.train.steps, recipe.train.learning_rate) == (20, 3e-4)
    assert recipe.attention.resolve_group_size(1001) == 250
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.revision=1234567", "1234567"),
        ("model.revision=12e4567", "12e4567"),
        ("model.revision=0123", "0123"),
        ("model.revision=null", None),
        ("model.revision='null'", "null"),
        ('model.revision="12e45"', "12e45"),
        ("model.name_or_path=3e-4", "3e-4"),
        ("model.name_or_path=2024-01-01", "2024-01-01"),
        ("run_dir=nan", "nan"),
        ("run_dir=yes", "yes"),
        ("run_dir=[exp1]", "[exp1]"),
        ("data.instruct.system=1_000", "1_000"),
        ("eval.longppl.evaluator=1e5", "1e5"),
        ("train.learning_rate=3e-4", 3e-4),
        ("context.rope_factor=4e0", 4.0),
        ("context.rope_factor=null", None),
        ("train.mlp_tile_tokens=1e3", 1000),
        ("data.train=['1e5']", ["1e5"]),
    ],
)
def test_text_is_taken_as_it_was_typed_and_exponents_are_numbers_elsewhere(override: str, expected: object) -> None:
    value: object = build_recipe(MINIMAL, [override])
    for name in override.partition("=")[0].split("."):
        value = getattr(value, name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("values", "overrides", "expected"),
    [
        ({}, ["train.stepz=3"], "unknown key train.stepz; did you mean train.steps?"),
        ({}, ["steps=3"], "unknown key steps; did you mean train.steps?"),
        ({}, ["training.learning_rate=1"], "unknown key training; did you mean train?"),
        ({}, ["train.group_size=4"], "unknown key train.group_size; did you mean attention.group_size?"),
        ({}, ["train.steps=0"], "train.steps = 0: Input should be greater than 0"),
        ({}, ["train.seed=4294967296"], "train.seed = 4294967296: Input should be less than 4294967296"),
        ({}, ["train.seed=20261231235959"], "train.seed = 20261231235959: Input should be less than 4294967296"),
        ({}, ["run_dir=null"], "run_dir = None: Input should be a valid string"),
        ({}, ["run_dir=a: b: c"], "the value is not valid YAML; quote it"),
        ({}, ["train.steps=many"], "train.steps = 'many'"),
        ({}, ["train.steps"], "override 'train.steps' is not of the form"),
        ({}, ["run_dir.x=1"], "run_dir is a value, not a section"),
        ({}, ["attention.group_size_ratio=0.5"], "give exactly one of them"),
        ({}, ["attention.group_size=null"], "give exactly one of them"),
        ({}, ["attention.group_size=7"], "attention: group_size=7 is odd, and half a group must be whole tokens"),
        ({}, ["attention.group_size=7"], "whatever the shift: give 6 or 8"),
        ({}, ["attention.group_size=7", "attention.shift=none"], "group_size=7 is odd"),
        ({}, ["attention.group_size=1", "attention.sink_tokens=0"], "group_size=1 is odd"),
        ({}, ["attention.group_size=1", "attention.sink_tokens=0"], "whatever the shift: give 2"),
        ({}, ["attention.sink_tokens=2048"], "sink_tokens=2048 must be less than group_size=2048"),
        ({}, ["attention.sink_tokens=2049"], "lower sink_tokens or raise group_size to at least 2050"),
        (
            {},
            [*RATIO, "attention.group_size_ratio=0.04"],
            "recipe: attention.group_size_ratio=0.04 of context.context_length=100 is a group of 4 tokens, and one "
            "must hold more than attention.sink_tokens=4: raise group_size_ratio to at least 0.06",
        ),
        ({}, [*RATIO, "attention.group_size_ratio=0.01", "attention.sink_tokens=0"], "to at least 0.02"),
        ({}, [*RATIO, "attention.group_size_ratio=1", "attention.sink_tokens=100"], "=100: lower sink_tokens"),
        (
            {},
            ["attention.full_attention_layers=[0,-1]"],
            "full_attention_layers=[0, -1] has -1, and layers are counted",
        ),
        ({}, ["attention.full_attention_layers=[3,0,3]"], "names layer 3 more than once: name it once"),
        (
            {},
            ["attention.backend=flash"],
            "attention.backend = 'flash': Input should be 'auto', 'grouped', 'varlen' or",
        ),
        ({}, ["eval.perplexity.context_lengths=[1]"], "context_lengths.0 = 1"),
        ({}, ["eval.passkey.depths=[1.5]"], "depths.0 = 1.5"),
        (
            {},
            ["adapter.method=full", "adapter.embedding_rows=occurring"],
            "adapter: method=full trains every parameter and has no adapter, so that embedding_rows=occurring would "
            "not be read: leave it out (on the command line adapter={method: full} does) or set method=lora",
        ),
        (
            {},
            ["adapter.method=full", "adapter.r=16", "adapter.target_modules=[q_proj]", "adapter.train_norms=false"],
            "so that r=16, target_modules=['q_proj'], train_norms=False would not be read: leave them out",
        ),
        (
            {},
            ["adapter.method=full", "model.quantization=nf4"],
            "recipe: model.quantization=nf4 keeps weights in 4 bits, which cannot be trained, and adapter.method=full "
            "trains them all: set adapter.method=lora (QLoRA) or model.quantization=none",
        ),
        ({}, ["adapter.method=qlora"], "'qlora': Input should be 'lora' or 'full'; did you mean lora?"),
        ({"context": {}}, [], "context.context_length is missing"),
        (
            {"eval": {"passkey": {"depth": [1]}}},
            [],
            "unknown key eval.passkey.depth; did you mean eval.passkey.depths?",
        ),
    ],
)
def test_mistakes_are_named_with_a_remedy(values: dict[str, object], overrides: list[str], expected: str) -> None:
    with pytest.raises(LongLoraError) as caught:
        build_recipe(minimal(**values), overrides)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_full_fine_tuning_replaces_the_adapter_section_of_a_recipe() -> None:
    lora = build_recipe(minimal(adapter={"r": 16, "train_embeddings": False}))
    full = build_recipe(lora.model_dump(), ["adapter={method: full}"])
    assert (full.adapter.method, full.adapter.r, full.adapter.train_embeddings) == ("full", 8, True)
    assert lora.adapter.method == "lora"
    assert build_recipe(full.model_dump()) == full


def test_the_smallest_ratio_that_is_named_is_enough() -> None:
    for ratio, works in ((0.059, False), (0.06, True)):
        overrides = [*RATIO, f"attention.group_size_ratio={ratio}"]
        if works:
            assert build_recipe(MINIMAL, overrides).attention.resolve_group_size(100) == 6
        else:
            with pytest.raises(LongLoraError, match=r"at least 0\.06"):
                build_recipe(MINIMAL, overrides)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- 1", "holds list"),
        ("a: [", "is not valid YAML"),
        ("!!python/object/apply:os.system [ls]", "is not valid YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(LongLoraError, match=expected):
        load_recipe(path)
    with pytest.raises(LongLoraError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")


def test_every_setting_is_read_by_some_code() -> None:
    """A setting that is documented, validated and then read by nobody misleads."""
    read: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside_config = path.parent == SOURCE / "config"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                if inside_config and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                    continue
                read.add(node.attr)
    unused = [key for key in leaf_keys(Recipe) if key.rsplit(".", 1)[-1] not in read]
    assert not unused
    assert "steps" in read
    assert "no_such_setting" not in read


def test_shipped_recipes_are_valid() -> None:
    paths = sorted((SOURCE / "recipes").glob("*.yaml"))
    assert len(paths) >= 2
    for path in paths:
        load_recipe(path)

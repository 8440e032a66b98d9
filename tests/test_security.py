"""No code of others is run and nothing leads out of a folder: rules for the source, and hostile inputs."""

from __future__ import annotations

import ast
import json
from itertools import pairwise
from pathlib import Path

import pytest
from fault_jobs import merge_adapter
from safetensors.torch import load_file
from tiny import save_tiny_model, word_tokenizer

from longlora.artifacts import MANIFEST, SIDECAR, sha256_file, verify_manifest, write_manifest
from longlora.config import InstructConfig, ModelConfig, load_recipe
from longlora.data.instruct_template import adopt_template, render
from longlora.errors import DataError, LongLoraError, ModelError, RecipeError, RunFolderError
from longlora.model.adapter_files import require_own_adapter
from longlora.model.build import load_config, load_model, load_tokenizer
from longlora.model.sidecar import read_sidecar

SOURCE = Path(__file__).parent.parent / "src" / "longlora"
# Modules and functions that run or unpickle what they read.
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
BUILTINS = {"eval", "exec", "compile", "__import__"}  # methods of these names are others
FORBIDDEN_CALLS = BUILTINS | {
    "torch.load", "torch.jit.load", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "extractall", "extract", "unpack_archive", "Template", "Environment", "Markup", "mktemp", "runpy.run_path",
    "runpy.run_module", "os.execv", "os.execvp", "os.spawnv", "os.startfile", "add_safe_globals", "safe_globals",
    "yaml.load_all", "yaml.unsafe_load_all", "yaml.full_load_all", "getoutput", "getstatusoutput",
}  # fmt: skip
OWN_NAMES = {"torch", "yaml", "os", "pickle", "runpy", "shutil", "zipfile", "tarfile"}  # are imported under no other


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_in_the_source_runs_what_it_reads(path: Path) -> None:
    check_source(path.read_text(encoding="utf-8"), path.name)


def check_source(text: str, file: str) -> None:
    tree = ast.parse(text)
    # Of pickle only the errors, which torch.load raises with weights_only too.
    harmless = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    harmless = {name for name in harmless if name.startswith("pickle.")}
    allowed = {"pickle"} if harmless and harmless <= {"pickle.PickleError", "pickle.UnpicklingError"} else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            name = str(node.module or "")
            assert name.split(".")[0] not in FORBIDDEN_IMPORTS, f"{file}:{node.lineno} imports from {name}"
            names = {f"{name}.{each.name}" for each in node.names}
            assert not names & FORBIDDEN_CALLS, f"{file}:{node.lineno} takes {names} under a name of its own"
        if isinstance(node, ast.Import):
            for each in node.names:
                assert each.name.split(".")[0] not in FORBIDDEN_IMPORTS - (set() if each.asname else allowed)
                assert not each.asname or each.name not in OWN_NAMES, f"{file}:{node.lineno} renames {each.name}"
        if not isinstance(node, ast.Call):
            continue
        name, given = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        constants = {key: value.value for key, value in given.items() if isinstance(value, ast.Constant)}
        if name == "torch.load" and constants.get("weights_only") is True:
            continue  # tensors and numbers alone
        if name in FORBIDDEN_CALLS or name.rpartition(".")[2] in FORBIDDEN_CALLS - BUILTINS:
            raise AssertionError(f"{file}:{node.lineno} calls {name}")
        assert "trust_remote_code" not in given or constants.get("trust_remote_code") is False, node.lineno
        for option in ("shell", "allow_pickle", "share"):
            # What is no constant may be true.
            assert (
                option not in given
                or constants.get(option, True) in (False, None)
                or (option == "share" and not isinstance(given[option], ast.Constant) and not name.endswith("launch"))
            ), f"{file}:{node.lineno} sets {option}"
        assert "weights_only" not in given or constants.get("weights_only") is True, f"{file}:{node.lineno}"
        assert "use_safetensors" not in given or constants.get("use_safetensors") is True, f"{file}:{node.lineno}"


@pytest.mark.parametrize(
    "text",
    [
        "import pickle\npickle.loads(x)", "import pickle as p\np.PickleError", "from pickle import loads",
        "import pickle", "from torch import load\nload(x)", "import torch as t\nt.load(x)", "torch.load(x)",
        "torch.load(x, weights_only=flag)", "np.load(x, allow_pickle=flag)", "run(x, shell=flag)", "eval(x)",
        "from os import system", "import os as o", "import yaml as y", "yaml.load(x, Loader=yaml.Loader)",
        "archive.extractall(x)", "zipfile.ZipFile(x).extract(y)", "jinja2.Environment()", "demo.launch(share=flag)",
        "M.from_pretrained(x, trust_remote_code=flag)", "M.from_pretrained(x, use_safetensors=None)",
        "safe_globals([x])", "torch.serialization.add_safe_globals([x])", "os.execv(x, y)", "Markup(x)",
    ],
)  # fmt: skip
def test_the_rules_find_what_they_forbid(text: str) -> None:
    with pytest.raises(AssertionError):
        check_source(text, "x.py")


def test_errors_of_pickle_are_no_pickle() -> None:
    check_source(
        "import pickle\ntry:\n    torch.load(x, weights_only=True)\nexcept pickle.PickleError:\n    pass", "x.py"
    )


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_models_and_tokenizers_with_their_own_code_are_refused(tmp_path: Path, file: str) -> None:
    model = save_tiny_model(tmp_path / "model")
    marker = tmp_path / "ran"
    (model / "own.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n", encoding="utf-8")
    values = json.loads((model / file).read_text())
    names = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": [None, "own.T"]}
    (model / file).write_text(json.dumps(values | {"auto_map": names}))
    load = load_config if file == "config.json" else load_tokenizer
    with pytest.raises(ModelError, match=r"brings its own code \(auto_map\), which longlora does not run"):
        load(ModelConfig(name_or_path=str(model)))
    assert not marker.exists()


def test_weights_in_a_pickle_are_never_opened(tmp_path: Path) -> None:
    import torch

    model = save_tiny_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(ModelConfig(name_or_path=str(model)))


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append({'role': 'system', 'content': 'x'}) }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(999999999) %}x{% endfor %}",
    ],
)
def test_chat_templates_are_run_in_the_sandbox_only(attack: str) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = attack + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    turns = [{"role": "user", "content": "ping?"}, {"role": "assistant", "content": "pong"}]
    with pytest.raises(DataError, match="does not take this conversation"):
        text = render(tokenizer, turns, "here").text
        assert "<class" not in text
    with pytest.raises(DataError):
        adopt_template(tokenizer, InstructConfig())


class TestManifest:
    @pytest.mark.parametrize(
        "name", ["../secret", "/etc/hostname", "a/../../secret", "link", "./a", "a//b", "", "a\0b", "a" * 300]
    )
    def test_names_that_lead_out_of_the_folder_are_refused(self, tmp_path: Path, name: str) -> None:
        folder = tmp_path / "shard"
        folder.mkdir()
        (folder / "a").write_text("a")
        (tmp_path / "secret").write_text("secret")
        (folder / "link").symlink_to(tmp_path / "secret")
        write_manifest(folder, schema=1)
        manifest = json.loads((folder / MANIFEST).read_text())
        secret = {"bytes": 6, "sha256": sha256_file(tmp_path / "secret")}
        manifest["files"] = {"a": manifest["files"]["a"], name: secret}
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(RunFolderError, match="which is no file in its folder: REMEDY"):
            verify_manifest(folder, "REMEDY")

    def test_a_folder_that_is_itself_a_link_is_fine(self, tmp_path: Path) -> None:
        (tmp_path / "disk").mkdir()
        (tmp_path / "disk" / "a").write_text("a")
        write_manifest(tmp_path / "disk")
        (tmp_path / "run").symlink_to(tmp_path / "disk")
        verify_manifest(tmp_path / "run", "REMEDY")


class TestAdapter:
    @pytest.fixture
    def adapter(self, tmp_path: Path) -> Path:
        from export_cases import tiny_base, trained_run

        return trained_run(tmp_path / "run", tiny_base(tmp_path / "base"))[0].adapter

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("layer_replication", [[0, 1]] * 1000),
            ("megatron_config", {"a": 1}),
            ("auto_mapping", {"base_model_class": "Popen", "parent_library": "subprocess"}),
            ("init_lora_weights", "pissa"),
            ("runtime_config", {"ephemeral_gpu_offload": True}),
            ("peft_type", "PREFIX_TUNING"),
            ("r", 2**40),
            ("r", True),
            ("target_modules", [1]),
            ("unheard_of", 1),
        ],
    )
    def test_settings_of_others_are_refused(self, adapter: Path, name: str, value: object) -> None:
        require_own_adapter(adapter)
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
        with pytest.raises(RunFolderError, match=rf"adapter_config.json has '{name}' = .*longlora does not write"):
            require_own_adapter(adapter)

    def test_a_pickle_in_place_of_the_weights_is_refused(self, adapter: Path, tmp_path: Path) -> None:
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        write_manifest(adapter, schema=1, step=7)
        with pytest.raises(RunFolderError, match=r"adapter_model.safetensors is missing, and nothing else is read"):
            merge_adapter(adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"base_model": "../../etc"}, "leads upwards"),
            ({"base_model": ""}, "base_model: "),
            ({"base_model": "a\0b"}, "base_model: "),
            ({"context_length": "256"}, "context_length: "),
            ({"context_length": -1}, "context_length: "),
            ({"dtype": "float8"}, "dtype: "),
            ({"rope_parameters": {"factor": [[1]]}}, "rope_parameters hold other than numbers"),
            ({"rope_parameters": {"factor": 1e300}}, "rope_parameters hold other than numbers"),
            ({"attention": {"group_size": -4}}, "group_size: "),
            ({"tokenizer_sha256": "x"}, "tokenizer_sha256: "),
            ({"more": 1}, "more: "),
            ({"schema": 2}, "has no schema 1"),
        ],
    )
    def test_a_sidecar_that_longlora_does_not_write_is_refused(
        self, adapter: Path, changes: dict[str, object], expected: str
    ) -> None:
        values = json.loads((adapter / SIDECAR).read_text())
        (adapter / SIDECAR).write_text(json.dumps(values | changes))
        with pytest.raises(RunFolderError, match=expected):
            read_sidecar(adapter)

    def test_the_home_folder_is_not_in_the_sidecar(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from export_cases import tiny_base, trained_run

        monkeypatch.setenv("HOME", str(tmp_path))
        adapter = trained_run(tmp_path / "run", tiny_base(tmp_path / "base"))[0].adapter
        assert json.loads((adapter / SIDECAR).read_text())["base_model"] == "~/base"
        assert read_sidecar(adapter).base_model == str((tmp_path / "base").resolve())


class TestRecipe:
    @pytest.mark.parametrize(
        "text",
        [
            "a: &a [x,x,x,x,x,x,x,x,x]\n"
            + "".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in pairwise("abcdefgh")),
            "a: &a {x: 1}\n"
            + "".join(f"{c}: &{c} {{<<: [{','.join(['*' + p] * 9)}]}}\n" for p, c in pairwise("abcdefgh")),
            "- &a0 x\n" + "".join(f"- &a{i} [*a{i - 1}]\n" for i in range(1, 300)),
            "&a [*a]",
            "[" * 5000,
            "- " * 500,
            "a: 2001-99-99",
            "!!bool x",
            '!!int ""',
            "!!timestamp x",
            "!!python/object/apply:os.system [ls]",
            "x" * (2**20 + 1),
        ],
        ids=range(12),
    )
    def test_yaml_that_is_a_trap_is_refused(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "r.yaml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError, match="is not valid YAML"):
            load_recipe(path)

    def test_aliases_are_fine_where_they_stand_for_little(self, tmp_path: Path) -> None:
        path = tmp_path / "r.yaml"
        path.write_text(
            "run_dir: r\nmodel: {name_or_path: m}\ncontext: &c {context_length: 100}\neval: {haystack: &t [a, b]}\n"
            "data: {train: *t}\n"
        )
        assert load_recipe(path).data.train == ["a", "b"]

    @pytest.mark.parametrize("override", ["run_dir=", 'run_dir="a\\0b"', "train.learning_rate=inf", "train.steps=.nan"])
    def test_values_that_no_run_can_use(self, override: str) -> None:
        from longlora.config import build_recipe

        values = {"run_dir": "r", "model": {"name_or_path": "m"}, "context": {"context_length": 100}}
        with pytest.raises(LongLoraError):
            build_recipe(values, [override])

"""Which parts of the method help, on SmolLM2-135M-Instruct: a run of training and measuring for each variant and seed.

python benchmarks/ablate.py attention --seeds 3     appends to benchmarks/results/ablations.csv
Weights and texts come out of pinned Python packages, as in `longlora quickstart`; two documents and all others of their
authors are held out. A run whose row is there already is not repeated, so a script that was stopped goes on where it
was, and several processes at once share the runs (each with OMP_NUM_THREADS=1). Seeds come last: the first of every
variant, then the second of those that matter. Every run is `longlora train` and `longlora eval` in new processes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ablation_variants import EXPERIMENTS, Size, Texts, Variant
from rich.console import Console
from rows import RESULTS, append_rows, read_rows

from longlora.artifacts import RunFolder, read_json, write_atomic
from longlora.config import Recipe, dump_recipe
from longlora.data.prepare import prepare_shards
from longlora.errors import RunFolderError
from longlora.model.build import load_tokenizer, tokenizer_hash
from longlora.quickstart.run import quickstart_recipe
from longlora.storage import exclusive

NAME = "ablations"
Work = tuple[str, Variant, int]


def planned(experiments: list[str], seeds: int, only: str | None) -> Iterator[Work]:
    """What to run, the first seed of every variant before the second of any."""
    for seed in range(seeds):
        for experiment in experiments:
            for variant in EXPERIMENTS[experiment]:
                if (seed == 0 or variant.matters) and (only is None or only in variant.name):
                    yield experiment, variant, seed


def done() -> set[str]:
    """Identities of the runs whose rows are there."""
    return {row["settings"] for row in read_rows(NAME)}


@contextlib.contextmanager
def taken(identity: str) -> Iterator[bool]:
    """Whether no other process is at this run; until the block ends no other will be."""
    with contextlib.ExitStack() as held:
        mine = True
        try:
            held.enter_context(exclusive(RESULTS / f".{NAME}-{identity}.lock", "this run", "ablate.py"))
        except RunFolderError:
            mine = False
        yield mine


def texts_of(files: list[str]) -> list[str]:
    return [Path(file).read_text(encoding="utf-8") for file in files]


def write_documents(path: Path, texts: list[str], every: int) -> None:
    """One JSON line a document; of `every` texts one is cut into documents of paragraphs, about 400 tokens each."""
    documents: list[str] = []
    for number, text in enumerate(texts):
        documents += short_documents(text) if number % every == 0 else [text]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")


def short_documents(text: str, characters: int = 1500) -> list[str]:
    """Whole paragraphs, as many as it takes to reach `characters`."""
    found, gathered = [], ""
    for paragraph in text.splitlines(keepends=True):
        gathered += paragraph
        if len(gathered) >= characters:
            found.append(gathered)
            gathered = ""
    return [*found, gathered] if gathered.strip() else found


class Shards:
    """Token shards that all runs on the same texts share."""

    def __init__(self, folder: Path, size: Size, texts: Texts) -> None:
        self._run, self._size, self._texts = RunFolder(folder), size, []
        recipe = self._recipe(folder, Variant("", texts=texts))
        tokenizer = load_tokenizer(recipe.model)
        if texts != "whole":
            folder.mkdir()
            train = folder / "train.jsonl"
            long = [text for text in texts_of(recipe.data.train) if len(tokenizer(text).input_ids) >= size.context]
            write_documents(train, long, every=1 if texts == "cut" else 2)
            self._texts = [f"data.train=[{train}]", f"data.heldout={recipe.data.heldout}"]
            recipe = self._recipe(folder, Variant("", texts=texts))
        prepare_shards(recipe, tokenizer, tokenizer_hash(tokenizer), Console(stderr=True))

    def _recipe(self, folder: Path, variant: Variant, seed: int = 0) -> Recipe:
        settings = [*variant.settings(self._size, seed), *self._texts]
        return quickstart_recipe(folder, None, settings, Console(quiet=True))

    def run_folder(self, folder: Path, variant: Variant, seed: int) -> tuple[RunFolder, Recipe]:
        """A run folder with these shards and the recipe of `variant`."""
        run = RunFolder(folder)
        run.train_shard.parent.mkdir(parents=True)
        for shard, link in ((self._run.train_shard, run.train_shard), (self._run.heldout_shard, run.heldout_shard)):
            link.symlink_to(shard)
        recipe = self._recipe(folder, variant, seed)
        write_atomic(run.recipe, dump_recipe(recipe))
        return run, recipe


def longlora(verb: str, run: RunFolder, seconds: float) -> None:
    subprocess.run([sys.executable, "-m", "longlora", verb, str(run.root)], check=True, timeout=seconds)


def measured(run: RunFolder, recipe: Recipe, seconds: float) -> dict[str, Any]:
    """Train, unless the recipe measures an untrained model, and measure."""
    (name,) = recipe.eval.variants
    training: dict[str, Any] = {"steps": 0, "tokens": 0, "train_loss": "", "seconds_per_step": ""}
    if name == "trained":
        longlora("train", run, seconds)
        rows = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if row.get("loss") is not None and row["step"] > 0]
        times = [after["seconds"] - before["seconds"] for before, after in itertools.pairwise(rows)]
        training = {
            "steps": rows[-1]["step"],
            "tokens": rows[-1]["tokens"],
            "train_loss": f"{statistics.mean(row['loss'] for row in rows[-4:]):.4f}",
            "seconds_per_step": f"{statistics.median(times):.2f}",
        }
    longlora("eval", run, seconds)
    return training | scores(read_json(run.evaluation(name), "measure again"), recipe.context.context_length)


def scores(evaluation: dict[str, Any], context: int) -> dict[str, str]:
    """Of documents of one, two and four rows: loss, loss of the last 1,024 tokens, and of hidden numbers (passkey) and
    of needles the log-probability and the part that was answered right. Empty where a length was not measured.
    """
    found: dict[str, str] = {}
    for times in (1, 2, 4):
        length = times * context
        read = [row for row in evaluation["perplexity"] if row["context_length"] == length]
        found |= {
            f"loss_{times}x": _mean([row["loss"] for row in read]),
            f"tail_loss_{times}x": _mean([row["tail_loss"] for row in read]),
        }
        for task, correct in (("passkey", "correct"), ("needle", "needle_correct")):
            asked = [row for row in evaluation["retrieval"] if (row["task"], row["length"]) == (task, length)]
            found |= {
                f"{task}_{times}x": _mean([row["log_probability"] for row in asked]),
                f"{correct}_{times}x": _mean([float(row["correct"]) for row in asked]),
            }
    return found


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f}" if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=sorted(EXPERIMENTS))
    parser.add_argument("--context", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", help="variants whose names hold this")
    parser.add_argument("--seconds", type=float, default=7200, help="that each stage of a run may take")
    parser.add_argument("--list", action="store_true", help="say what is missing, and run nothing")
    args = parser.parse_args()
    size = Size(args.context, args.steps)
    finished = done()
    missing = [
        (experiment, variant, seed)
        for experiment, variant, seed in planned(args.experiments, args.seeds, args.only)
        if variant.identity(size, seed) not in finished
    ]
    for experiment, variant, seed in missing if args.list else []:
        print(f"{experiment}: {variant.name}, seed {seed}")
    if args.list or not missing:
        print(f"{len(missing)} runs are missing")
        return
    with tempfile.TemporaryDirectory() as temporary:
        shards: dict[Texts, Shards] = {}
        for number, (experiment, variant, seed) in enumerate(missing, 1):
            identity = variant.identity(size, seed)
            with taken(identity) as mine:
                if not mine or identity in done():  # under another name, or by another process
                    continue
                print(f"{number} of {len(missing)}: {experiment}, {variant.name}, seed {seed}", flush=True)
                if variant.texts not in shards:
                    shards[variant.texts] = Shards(Path(temporary) / variant.texts, size, variant.texts)
                run, recipe = shards[variant.texts].run_folder(Path(temporary) / f"run-{number}", variant, seed)
                row = {"settings": identity, "variant": variant.name, "seed": seed, "context": size.context}
                row |= measured(run, recipe, args.seconds)
                append_rows(NAME, [row], torch.device("cpu"))
                shutil.rmtree(run.root)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

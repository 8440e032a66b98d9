"""Write the tables of docs/scale.md: ``python docs/make_scale.py``. The text around them is written by hand.

Every number is the planner's, from the configs in tests/model_configs.py, but for the measured bytes, which are rows of
benchmarks/results/halo.csv, and the paper's hours.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from model_configs import model_config
from scale_traffic import K, M, measured_block, traffic_block, written

from longlora.config import Recipe, build_recipe, load_recipe
from longlora.memory import chunked_loss
from longlora.planning.machines import Machine, gpu, with_memory
from longlora.planning.plan import Plan, plan_run

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale.md"
RECIPES = ROOT / "src" / "longlora" / "recipes"
_KINDS = {"a100": "a100-80g", "h100": "h100-80g", "h200": "h200"}
# Table 12 of the paper, LongLoRA on 8 A100.
PAPER_HOURS = {"llama-2-7b_8k_8xa100": "5.2", "llama-2-7b_16k_8xa100": "11.3", "llama-2-7b_32k_8xa100": "24.6"}
_UNPUBLISHED = ("llama-2-7b_100k_8xa100", "llama-2-13b_64k_8xa100", "llama-2-70b_32k_8xa100")
_ENDLESS = 1e6  # GB: a plan that fits does not look for a context that does


@dataclass(frozen=True)
class Row:
    """A recipe on a machine, and what is changed of it."""

    name: str
    machine: str = ""
    """For example ``8xa100``; the name says it if this is empty."""
    changes: tuple[str, ...] = ()


# What somebody would try first, and does not fit.
VARIANTS = (
    Row("llama-2-70b_32k_8xa100", changes=("parallel.sequence=1", "train.grad_accum_steps=8")),
    Row("llama-3.1-8b_512k_h200", "h100"),
)


def recipe_rows() -> list[Row]:
    """The recipes whose name ends in GPUs, with the variants that do not fit."""
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    rows = [Row(name) for name in names if re.search(r"_(\d+x)?(a100|h[12]00)$", name)]
    return [each for row in rows for each in (row, *(other for other in VARIANTS if other.name == row.name))]


def machine_of(row: Row) -> Machine:
    """The machine that a recipe's name ends with."""
    count, _, kind = (row.machine or row.name.rsplit("_", 1)[1]).rpartition("x")
    return gpu(_KINDS[kind], int(count or 1))


def plan(recipe: Recipe, machine: Machine) -> Plan:
    """The plan of a recipe; that it fits is not said by its own `fits`."""
    with loss_of_a_gpu():
        return plan_run(recipe, model_config(recipe.model.name_or_path), with_memory(machine, _ENDLESS))


@contextlib.contextmanager
def loss_of_a_gpu() -> Iterator[None]:
    """Rehearse the loss as a GPU makes it: a CPU, where fake tensors are, takes blocks that its cache holds, slowly."""
    before = chunked_loss._CACHED
    chunked_loss._CACHED = 2**62
    try:
        yield
    finally:
        chunked_loss._CACHED = before


def recipe_row(row: Row) -> str:
    """One line of the table of recipes."""
    recipe, machine = load_recipe(RECIPES / f"{row.name}.yaml", row.changes), machine_of(row)
    made = plan(recipe, machine)
    name = f"[{row.name}](../src/longlora/recipes/{row.name}.yaml)"
    changes = ", ".join([*(["on one H100-80G"] if row.machine else []), *(f"`{change}`" for change in row.changes)])
    published = PAPER_HOURS.get(row.name, "not published" if row.name in _UNPUBLISHED else "-")
    cells = (
        f"{name}, {changes}" if changes else name,
        f"{machine.count} x {machine.name}",
        mesh(made),
        f"{made.tokens_per_step:,}",
        *memory_cells(made, machine),
        f"{made.hours:,.1f}",
        published if not changes else "-",
    )
    return f"| {' | '.join(cells)} |"


def memory_cells(made: Plan, machine: Machine) -> tuple[str, str, str]:
    """Memory of one device, main memory beside it, and whether the device holds it."""
    peak = made.memory.peak / 1e9
    fits = made.memory.peak <= machine.memory_bytes
    beside = f"{made.memory.offloaded / 1e9:,.0f}" if made.memory.offloaded else "-"
    return f"{peak:,.1f}", beside, "yes" if fits else f"**no: needs {peak - machine.memory_bytes / 1e9:,.1f} GB more**"


def mesh(made: Plan) -> str:
    """Devices as data x sequence, and what is divided."""
    each = made.mesh
    return f"{each.data} x {each.sequence}, {each.shard}"


def recipes_block(rows: Iterable[Row]) -> str:
    """The table of recipes."""
    return "\n".join(
        [
            "| recipe | machine | data x sequence, shard | tokens a step | GB of a GPU | GB of main memory for each | "
            "fits | hours | the paper's hours |",
            "|---|---|---|---|---|---|---|---|---|",
            *map(recipe_row, rows),
        ]
    )


@dataclass(frozen=True)
class Point:
    """GPUs, a context, and the settings that hold it."""

    gpus: int
    tokens: int
    sequence: int
    shard: str = "fsdp2"
    offload: bool = False
    nf4: bool = False


POINTS = (
    Point(1, 128 * K, 1, "none", offload=True),
    Point(1, M, 1, "none", offload=True, nf4=True),
    Point(8, 128 * K, 1),
    Point(8, M, 8, offload=True),
    Point(8, 10 * M, 8, offload=True),
    Point(64, 128 * K, 1),
    Point(64, M, 8),
    Point(64, 10 * M, 64, offload=True),
    Point(512, 128 * K, 1),
    Point(512, M, 8),
    Point(512, 10 * M, 128),
)


def point_recipe(point: Point) -> Recipe:
    """Qwen3-8B with one row a device or a group of devices in each step."""
    return build_recipe(
        {
            "run_dir": "run",
            "model": {
                "name_or_path": "Qwen/Qwen3-8B-Base",
                "original_context_length": 32768,
                "quantization": "nf4" if point.nf4 else "none",
            },
            "context": {"context_length": point.tokens},
            "attention": {"group_size": 8192},
            "train": {
                "grad_accum_steps": 1,
                "mlp_tile_tokens": 8192,
                "activation_offload": point.offload,
            },
            "parallel": {"sequence": point.sequence, "shard": point.shard},
        }
    )


def point_row(point: Point) -> str:
    """One line of the table of scales."""
    recipe, machine = point_recipe(point), gpu("h100-80g", point.gpus)
    made = plan(recipe, machine)
    levers = [*(["nf4"] if point.nf4 else []), *(["activation_offload"] if point.offload else [])]
    halo = sum(each.bytes for each in made.messages if each.name == "halo")
    others = sum(each.bytes for each in made.messages if each.name != "halo")
    peak, beside, fits = memory_cells(made, machine)
    held = fits == "yes"
    cells = (
        f"{point.gpus}",
        written(point.tokens),
        mesh(made) + "".join(f", {lever}" for lever in levers),
        peak,
        beside,
        fits,
        f"{made.time.total:,.1f}" if held else "-",
        f"{made.tokens_per_step / made.time.total / point.gpus:,.0f}" if held else "-",
        f"{halo / 1e9:,.2f}" if held and halo else "-",
        f"{others / 1e9:,.1f}" if held and others else "-",
    )
    return f"| {' | '.join(cells)} |"


def scale_block(points: Iterable[Point]) -> str:
    """The table of 1, 8, 64 and 512 GPUs."""
    return "\n".join(
        [
            "| GPUs | context | data x sequence, shard, levers | GB of a GPU | GB of main memory for each | fits | "
            "seconds a step | tokens/s of a GPU | GB of halo sent | GB of weights and gradients sent |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *map(point_row, points),
        ]
    )


def stored(name: str, page: str | None = None) -> str:
    """What the page has between the marks of a part."""
    text = PAGE.read_text(encoding="utf-8") if page is None else page
    found = re.search(rf"<!-- {name}: generated.*?-->\n\n(.*?)\n\n<!-- end of {name} -->", text, re.DOTALL)
    if found is None:
        raise ValueError(f"{PAGE} has no part {name!r}")
    return found[1]


def main(wanted: Sequence[str]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    makers = {
        "recipes": lambda: recipes_block(recipe_rows()),
        "scale": lambda: scale_block(POINTS),
        "traffic": traffic_block,
        "measured": measured_block,
    }
    for name in wanted or list(makers):
        before = stored(name, page)
        page = page.replace(
            f"\n\n{before}\n\n<!-- end of {name} -->", f"\n\n{makers[name]()}\n\n<!-- end of {name} -->"
        )
        PAGE.write_text(page, encoding="utf-8")
        print(f"{PAGE}: {name}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

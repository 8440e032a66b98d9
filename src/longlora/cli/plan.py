"""``longlora plan``: what a run takes, before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longlora.cli.options import OverridesArgument, RecipeArgument, console, read_recipe
from longlora.errors import PlanError
from longlora.planning.levers import written

if TYPE_CHECKING:
    from longlora.planning.plan import Plan

Lines = list[tuple[str, str]]

_DIVIDED = {
    "none": "nothing",
    "zero2": "gradients and optimizer states",
    "zero3": "weights, gradients and optimizer states",
    "fsdp2": "weights, gradients and optimizer states",
}


def add_to(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command()(plan)


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    gpu: Annotated[str | None, typer.Option(help="Plan for this GPU, for example a100-80g.")] = None,
    gpus: Annotated[int, typer.Option(help="How many of them, eight in a node.")] = 1,
    memory: Annotated[float | None, typer.Option(help="GB of memory of one device, instead of what it has.")] = None,
    price: Annotated[float | None, typer.Option(help="Price of one device for an hour, in any currency.")] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Look for the longest context that fits.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what a run takes: parameters, FLOPs, memory by part, time, cost, disk. Needs the model's config alone."""
    resolved = read_recipe(recipe, overrides)
    if gpu is None and gpus != 1:
        raise PlanError(f"--gpus {gpus} needs --gpu, for example --gpu a100-80g")
    from longlora.model.build import device_for_run, load_config
    from longlora.model.levers import check_levers
    from longlora.model.rope import rescale_for
    from longlora.planning import machines
    from longlora.planning.calibrate import calibrate
    from longlora.planning.plan import plan_run, require_fits
    from longlora.planning.settle import settle_memory

    config = load_config(resolved.model)
    machine = machines.gpu(gpu, gpus) if gpu else machines.this_machine(resolved.parallel.sequence)
    if memory is not None:
        machine = machines.with_memory(machine, memory)
    say = Console(stderr=True)
    if machine.present:
        check_levers(resolved, device_for_run())
    extended, _ = rescale_for(resolved, config)
    if resolved.memory == "auto" and not fit:
        settled = settle_memory(resolved, extended, machine)
        resolved = settled.recipe
        say.print(settled.line, highlight=False, markup=False)
    if machine.present:
        say.print("measuring this machine on a few layers of the model ...", highlight=False)
        machine = calibrate(extended, resolved, machine)
    made = plan_run(resolved, config, machine, price_per_hour=price, fit=fit)
    if as_json:
        typer.echo(made.to_json())
    else:
        _print(made, console())
    if not fit:
        require_fits(made)


def _print(made: Plan, out: Console) -> None:
    for title, lines in (
        ("run", _run(made)),
        ("FLOPs of a step", _flops(made)),
        ("peak memory of one device", _memory(made)),
        ("sent in a step by one device", _messages(made)),
        ("time", _time(made)),
        ("disk", _disk(made)),
    ):
        if not lines:
            continue
        table = Table(title, "", box=box.SIMPLE_HEAD, pad_edge=False, min_width=60)
        table.columns[1].justify = "left" if title == "run" else "right"
        for name, value in lines:
            table.add_row(escape(name), escape(value))
        out.print(table)
    if made.fit is not None:
        out.print(_fit(made), highlight=False)


def _run(made: Plan) -> Lines:
    devices = f"{made.devices} x {made.machine}" if made.devices > 1 else made.machine
    lines = [
        ("model", made.model),
        ("machine", devices),
        *_mesh(made),
        ("context", f"{made.original_context_length:,} -> {made.context_length:,} tokens"),
        ("RoPE before", _rope(made.rope_before)),
        ("RoPE after", _rope(made.rope_after)),
        ("parameters", f"{made.parameters:,}"),
        ("trained", f"{made.trained:,} ({made.trained / made.parameters:.2%})"),
        ("tokens in a step", f"{made.tokens_per_step:,}"),
    ]
    if made.documents is not None:
        how = "counted in the prepared shard" if made.documents.counted else "estimated from file sizes"
        reach = f"{made.documents.reaching:,} of {made.documents.documents:,} reach the context ({how})"
        lines.append(("training documents", reach))
    elif made.documents_named:
        lines.append(("training documents", "counted once `longlora prepare` has read them"))
    return lines


def _mesh(made: Plan) -> Lines:
    """How the devices share the work; nothing where there is one."""
    mesh = made.mesh
    if mesh.devices == 1:
        return []
    nodes = f", on {mesh.nodes} nodes of {mesh.per_node}" if mesh.nodes > 1 else ""
    lines = [("data x sequence", f"{mesh.data} x {mesh.sequence}{nodes}")]
    if mesh.sequence > 1:
        lines.append(("tokens of a row on a device", f"{-(-made.context_length // mesh.sequence):,}"))
    return [*lines, ("divided among all", f"{_DIVIDED[mesh.shard]} ({mesh.shard})")]


def _messages(made: Plan) -> Lines:
    lines = []
    for each in made.messages:
        how = "beside computing" if each.overlapped else "waited for"
        lines.append((f"{each.name}, {how}", f"{each.bytes / 1e9:,.2f} GB, {each.seconds:,.2f} s"))
    return lines


def _flops(made: Plan) -> Lines:
    parts = made.step.by_part
    names = ("attention_scores", "attention_projections", "mlp", "lora", "output_head")
    lines = [(name.replace("_", " "), f"{getattr(parts, name) / 1e12:,.2f} T") for name in names]
    lines.append(("of them computed again for gradients", f"{made.step.recomputed.total / 1e12:,.2f} T"))
    lines.append(("total", f"{parts.total / 1e12:,.2f} T"))
    return lines


def _memory(made: Plan) -> Lines:
    lines = [(name.replace("_", " "), f"{size / 1e9:,.2f} GB") for name, size in made.memory.parts.items() if size]
    lines.append((f"peak, in {made.memory.moment}", f"{made.memory.peak / 1e9:,.2f} GB"))
    lines.append(("the device has", f"{made.memory_available / 1e9:,.2f} GB"))
    if made.memory.offloaded:
        lines.append(("offloaded to main memory", f"{made.memory.offloaded / 1e9:,.2f} GB"))
    if made.host_needed:
        lines.append(("main memory of a node while weights are read", f"{made.host_needed / 1e9:,.2f} GB"))
    return lines


def _time(made: Plan) -> Lines:
    seconds = made.time
    lines = [
        ("layers", f"{seconds.layers:,.2f} s"),
        ("attention scores", f"{seconds.attention_scores:,.2f} s"),
        ("output head and loss", f"{seconds.head_and_loss:,.2f} s"),
        ("optimizer", f"{seconds.optimizer:,.2f} s"),
        *([("waiting for messages", f"{seconds.communication:,.2f} s")] if made.messages else []),
        ("a step", f"{seconds.total:,.2f} s"),
        (f"{made.steps:,} steps", f"{made.hours:,.2f} h"),
    ]
    if made.cost is not None:
        lines.append(("cost", f"{made.cost:,.2f}"))
    lines.append(("rates", made.rates))
    return lines


def _disk(made: Plan) -> Lines:
    parts = (("checkpoints", made.disk.checkpoints), ("adapter", made.disk.adapter), ("merged model", made.disk.merged))
    return [(name, f"{size / 1e9:,.2f} GB") for name, size in parts if size]


def _fit(made: Plan) -> str:
    assert made.fit is not None
    line = f"longest context that fits: {made.fit.as_it_is:,} tokens"
    if made.fit.levers:
        line += f"; {made.fit.with_levers:,} with {written(made.fit.levers)}"
    if made.fit.across:
        line += f"; {made.fit.across:,} with {written(made.fit.levers | made.fit.parallel)}"
    return line


def _rope(parameters: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in parameters.items() if value is not None)

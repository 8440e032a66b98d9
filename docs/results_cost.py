"""The sections of results.md on time and memory."""

from __future__ import annotations

from results_rows import Row, every, newest, origin, table

VARIANTS = {
    "a": "Trainer, PEFT LoRA, full attention",
    "b": "the same with the paper's Algorithm 1, groups of T/4",
    "c": "longlora, groups of T/4",
    "d": "longlora, groups of 2,048, 4 sinks, compiled norms",
}
_WAYS = ("full", "Algorithm 1", "ours, 0 sinks", "ours, 4 sinks", "floor")


def train_step(rows: list[Row]) -> str:
    points = {(row["variant"], int(row["context"])): row for row in rows}
    contexts = sorted({context for _, context in points})

    def cell(variant: str, context: int, column: str, scale: float = 1.0) -> str:
        row = points.get((variant, context))
        if row is None:
            return ""
        return f"{float(row[column]) / scale:,.1f}" if row[column] else row["failed"].split(":")[0]

    head = ["seconds a step", *(f"{context:,}" for context in contexts)]
    seconds = [[f"({v}) {name}", *(cell(v, c, "seconds") for c in contexts)] for v, name in VARIANTS.items()]
    speed = [[f"({v})", *(cell(v, c, "tokens_per_second") for c in contexts)] for v in VARIANTS]
    memory = [[f"({v})", *(cell(v, c, "peak_mb", 1000) for c in contexts)] for v in VARIANTS]
    return "\n\n".join(
        table(top, lines)
        for top, lines in (
            (head, seconds),
            (["tokens a second", *head[1:]], speed),
            (["peak memory, GB", *head[1:]], memory),
        )
    )


def attention(rows: list[Row]) -> str:
    points = {(row["shape"], int(row["tokens"]), row["group"], row["way"]): row for row in rows}
    groups = sorted({(shape, tokens, group) for shape, tokens, group, _ in points if group})

    def seconds(shape: str, tokens: int, group: str, way: str) -> float:
        return float(points[shape, tokens, "" if way == "full" else group, way]["p50_s"])

    lines = []
    for place in groups:
        times = {way: seconds(*place, way) for way in _WAYS}
        ours = times["ours, 4 sinks"]
        lines.append([
            place[0], f"{place[1]:,}", place[2], *(f"{time:.3f}" for time in times.values()),
            f"{times['full'] / ours:.1f}", f"{times['Algorithm 1'] / ours:.2f}", f"{times['floor'] / ours:.2f}",
        ])  # fmt: skip
    head = ["shape", "tokens", "group", *_WAYS, "full / ours", "Algorithm 1 / ours", "floor / ours"]
    return table(head, lines)


def plan(rows: list[Row]) -> str:
    columns = ["predicted_mb", "measured_mb", "memory_error", "predicted_s", "measured_s", "time_error"]
    head = ["shape", "tokens", "settings", "planned MB", "MB", "error", "planned s", "s", "error"]
    return table(head, ([row["shape"], row["context"], row["settings"], *(row[c] for c in columns)] for row in rows))


def several_processes() -> list[str]:
    """The section on runs of several processes; empty without rows."""
    parts = []
    if planned := newest("plan_processes", "point"):
        columns = ["processes", "sequence", "shard", "settings", "predicted_mb", "measured_most_mb", "memory_error"]
        head = ["processes", "share a row", "sharded", "settings", "planned MB", "MB of the largest", "error"]
        parts += [
            f"`python benchmarks/bench_plan_processes.py`: peak memory of each process, {planned[0]['shape']} shape, "
            f"{int(planned[0]['context']):,} tokens, {planned[0]['dtype']}, gloo. {origin(planned)}.",
            table(head, ([row[column] for column in columns] for row in planned)),
        ]
    if steps := newest("sequence", "ranks"):
        lines = (
            [row["ranks"], row["tokens_per_rank"], row["seconds_p50"], row["processor_seconds_p50"]] for row in steps
        )
        parts += [
            "`python benchmarks/bench_sequence.py`: a step of rows cut across processes, as many tokens on each; "
            f"one thread a process, on two cores. {origin(steps)}.",
            table(["processes", "tokens on each", "seconds (median)", "processor seconds of the busiest"], lines),
        ]
    if curve := newest("sequence_curve", "run", "context", "step"):
        runs = list(dict.fromkeys(row["run"] for row in curve))
        found = {(row["run"], row["step"]): row["loss"] for row in curve}
        lines = ([step, *(found[run, step] for run in runs)] for step in dict.fromkeys(row["step"] for row in curve))
        parts += [
            f"`python benchmarks/bench_sequence_curve.py`: loss of steps of SmolLM2-135M-Instruct, "
            f"{curve[0]['dtype']}, rows of {curve[0]['context']} tokens, by one process and by two. {origin(curve)}.",
            table(["step", *runs], lines),
        ]
    return ["## Several processes", *parts] if parts else []


def paper_ratios() -> dict[str, list[tuple[int, float, float]]]:
    """Time and memory of sparse over full attention, both with LoRA: (tokens, time, memory) by who measured."""
    paper = {(row["method"], int(row["context"])): row for row in every("paper_cost")}
    ours = {(row["variant"], int(row["context"])): row for row in newest("train_step", "shape", "variant", "context")}
    return {
        "paper: Llama-2-7B on 8 A100 (table 12)": _ratios(paper, "LongLoRA", "LoRA", "hours", "peak_gb"),
        "(c) over (a): SmolLM2-135M on a CPU": _ratios(ours, "c", "a", "seconds", "peak_mb"),
        "(b) over (a): the paper's roll on the same CPU": _ratios(ours, "b", "a", "seconds", "peak_mb"),
    }


def _ratios(
    rows: dict[tuple[str, int], Row], sparse: str, full: str, time: str, memory: str
) -> list[tuple[int, float, float]]:
    found = []
    for context in sorted(context for method, context in rows if method == sparse):
        one, other = rows[sparse, context], rows.get((full, context))
        if other is not None and one[time] and other[time]:
            found.append((context, float(one[time]) / float(other[time]), float(one[memory]) / float(other[memory])))
    return found


def ratios_to_full() -> list[str]:
    """The section that sets our ratios beside the paper's; empty without rows."""
    if not newest("train_step", "shape", "variant", "context"):
        return []
    lines = [
        [name, f"{tokens:,}", f"{time:.2f}", f"{memory:.2f}"]
        for name, points in paper_ratios().items()
        for tokens, time, memory in points
    ]
    return [
        "## Beside the paper's own numbers",
        "Sparse over full attention, both with LoRA, groups of T/4: the paper's hours and peak memory (table 12, with "
        "FlashAttention-2; `benchmarks/results/paper_cost.csv`), and the rows of the table of training steps. Ratios, "
        "because models and machines differ: attention is a larger part of a small model's step.",
        "![Time and memory of sparse over full attention](results/ratios.svg)",
        table(["who", "tokens", "time", "memory"], lines),
    ]

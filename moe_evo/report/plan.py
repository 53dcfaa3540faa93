"""What `moe-evo plan` prints for people: the model, memory a rank, gangs, time, problems, and what to do next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_evo.report.table import experts_label, plain_table
from moe_evo.report.terminal import print_whole

_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def print_plan(plan: Mapping[str, Any], next_command: str, console: Console | None = None) -> None:
    """Print what `moe_evo.commands.plan.plan` answered. next_command: the search that was planned for."""
    console = console or Console()
    for line in _lines(plan, {"model": _model, "tasks": _tasks, "search": _search}):
        _line(console, line)
    if plan["memory"]:
        print_whole(console, memory_table(plan["memory"]))
        for line in _on_top(plan["memory"]):
            _line(console, line)
    for line in _lines(plan, {"checkpoint": _checkpoint, "cluster": _cluster, "estimate": _estimate}):
        _line(console, line)
    for note in plan["notes"]:
        _line(console, f"note        {note}")
    for number, problem in enumerate(plan["problems"], start=1):
        _line(console, f"problem {number:<3} {problem}", style="bold red")
    next_step = f"mend the {len(plan['problems'])} above, then plan again" if plan["problems"] else next_command
    _line(console, f"next        {next_step}")


def memory_table(memory: Mapping[str, Any]) -> Table:
    """One line a way of sharding; an arrow marks the config's own."""
    known = memory["device_bytes"]
    device_memory = f", device memory {size_label(known)}" if known is not None else ""
    table = plain_table(f"memory of the fullest rank, gangs of {memory['gang_size']}{device_memory}")
    table.add_column("", no_wrap=True)
    for heading in ("weights", "gathered", "host", "disk", "with a batch", "merged layers"):
        table.add_column(heading, justify="right", no_wrap=True)
    if known is not None:
        table.add_column("fits", no_wrap=True)
    for mode in memory["modes"]:
        sizes = ("device", "gathered", "host", "disk", "needed", "merged")
        cells = [size_label(mode[f"{name}_bytes"]) for name in sizes]
        if mode["refusal"]:
            cells = ["not possible", *[""] * 5]
        verdict = [] if known is None else ["" if mode["fits"] is None else "yes" if mode["fits"] else "no"]
        table.add_row(
            f"{'>' if mode['chosen'] else ' '} {_mode_label(mode)}", *cells, *verdict,
            style="bold" if mode["chosen"] else "",
        )  # fmt: skip
    return table


def size_label(number: int) -> str:
    """Bytes in the largest unit of which there is one; nothing for none."""
    for unit, name in _UNITS:
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number} B" if number else ""


def count_label(number: int) -> str:
    """Parameters as people say them."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return str(number)


def time_label(hours: float) -> str:
    """A time in days, hours, minutes or seconds, whichever is said first."""
    for unit, name in ((24.0, "d"), (1.0, "h"), (1 / 60, "min")):
        if hours >= unit:
            return f"{hours / unit:.1f} {name}"
    return f"{hours * 3600:.0f} s"


def _mode_label(mode: Mapping[str, Any]) -> str:
    return mode["sharding"] if mode["offload"] == "none" else f"{mode['sharding']}, {mode['offload']}"


def _lines(plan: Mapping[str, Any], sections: Mapping[str, Callable[[Any], list[str]]]) -> list[str]:
    """The lines of all sections; a part that could not be planned has none."""
    return [line for key, section in sections.items() if plan[key] is not None for line in section(plan[key])]


def _model(model: Mapping[str, Any]) -> list[str]:
    return [
        f"model       {model['path']} ({model['family']}, {model['dtype']})",
        f"layers      {model['moe_layers']} with experts of {model['decoder_layers']}, "
        f"{experts_label(model['num_experts'])} experts each, top-{experts_label(model['top_k'])}",
        f"parameters  {count_label(model['parameters'])}: {count_label(model['expert_parameters'])} in experts, "
        f"{count_label(model['parameters'] - model['expert_parameters'])} else; "
        f"{count_label(model['active_parameters'])} active a token; {size_label(model['bytes'])}",
    ]


def _tasks(tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"task        {task['name']} ({task['kind']}, {task['metric']}): "
        + ", ".join(f"{number} {split}" for split, number in task["examples"].items())
        for task in tasks
    ]


def _search(search: Mapping[str, Any]) -> list[str]:
    kind = "prunings, then merges" if search["merges"] else "prunings only"
    return [
        f"search      {search['algorithm']}, keeps {experts_label(search['num_kept'])}, {kind}; "
        f"{_number_label(search['log10_prunings'])} prunings to choose from",
        "evaluations at most " + ", ".join(f"{number} {split}" for split, number in search["evaluations"].items()),
    ]


def _number_label(log10: float) -> str:
    """A number by its logarithm, which is all that fits on a line for large ones."""
    return f"{round(10**log10):,}" if log10 < 12 else f"10^{log10:.0f}"


def _on_top(memory: Mapping[str, Any]) -> list[str]:
    chosen = next(mode for mode in memory["modes"] if mode["chosen"])
    lines = [
        f"on top      logits of a batch at most {size_label(memory['logits_bytes'])}, activations roughly "
        f"{size_label(memory['activations_bytes'])}"
    ]
    if chosen["merged_bytes"]:
        lines.append(
            f"            merged layers of one genome {size_label(chosen['merged_bytes'])}; what finds no room is "
            "merged in every forward pass"
        )
    return lines


def _checkpoint(checkpoint: Mapping[str, Any]) -> list[str]:
    return [
        f"export      {count_label(checkpoint['parameters'])} parameters, {size_label(checkpoint['bytes'])} "
        f"(loads with {checkpoint['loader']})"
    ]


def _cluster(cluster: Mapping[str, Any]) -> list[str]:
    nodes = f"{cluster['nodes']} node{'s' * (cluster['nodes'] != 1)}"
    return [
        f"cluster     {nodes}; gangs of {cluster['needs']}: {cluster['gangs_free']} fit now, "
        f"{cluster['gangs_whole']} when all is free"
    ]


def _estimate(estimate: Mapping[str, Any]) -> list[str]:
    parts = ", ".join(f"{split} {time_label(estimate[f'{split}_h'])}" for split in _splits(estimate))
    return [
        f"speed       {estimate['evaluation_s']:.3g} s an evaluation, {estimate['gangs']} at a time: "
        f"{estimate['evaluations_per_h']:.0f} evaluations an hour",
        f"time        {time_label(estimate['total_h'])} ({parts})",
    ]


def _splits(estimate: Mapping[str, Any]) -> Sequence[str]:
    return [key.removesuffix("_h") for key in estimate if key.endswith("_h") and key not in _NO_SPLITS]


_NO_SPLITS = ("evaluations_per_h", "total_h")


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True, style=style)

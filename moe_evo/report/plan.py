"""Prints the plan of `moe-evo plan`: the model, memory a rank, gangs, time, problems, and the next command."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from moe_evo.report.planned import (
    CheckpointPlan,
    ClusterPlan,
    Estimate,
    MemoryPlan,
    ModelPlan,
    ModeMemory,
    Plan,
    RecoveryPlan,
    SearchPlan,
    TaskPlan,
)
from moe_evo.report.screen import screen
from moe_evo.report.table import experts_label, loader_label, plain_table, print_whole

_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def print_plan(plan: Plan, next_command: str, console: Console | None = None) -> None:
    """Print the plan that `moe_evo.commands.plan.plan` returned. next_command: starts the planned search."""
    console = console or screen()
    for line in [*_model(plan.model), *_tasks(plan.tasks), *_search(plan.search)]:
        _line(console, line)
    if plan.memory is not None:
        print_whole(console, memory_table(plan.memory))
        for line in _on_top(plan.memory):
            _line(console, line)
    for line in [
        *_checkpoint(plan.checkpoint),
        *_recovery(plan.recovery),
        *_cluster(plan.cluster),
        *_estimate(plan.estimate),
    ]:
        _line(console, line)
    for note in (*plan.notes, *plan.warnings):
        _line(console, f"note        {note}")
    for number, problem in enumerate(plan.problems, start=1):
        _line(console, f"problem {number:<3} {problem}", style="bold red")
    next_step = f"mend the {len(plan.problems)} above, then plan again" if plan.problems else next_command
    _line(console, f"next        {next_step}")


def memory_table(memory: MemoryPlan) -> Table:
    """A table with one line for each mode of sharding; an arrow marks the config's."""
    known = memory.device_bytes
    device_memory = f", device memory {size_label(known)}" if known is not None else ""
    table = plain_table(f"memory of the fullest rank, gangs of {memory.gang_size}{device_memory}")
    table.add_column("", no_wrap=True)
    for heading in ("weights", "gathered", "host", "disk", "with a batch", "merged layers"):
        table.add_column(heading, justify="right", no_wrap=True)
    if known is not None:
        table.add_column("fits", no_wrap=True)
    for mode in memory.modes:
        held = (mode.device_bytes, mode.gathered_bytes, mode.host_bytes, mode.disk_bytes)
        cells = [size_label(size) for size in (*held, mode.needed_bytes, mode.merged_bytes)]
        if mode.refusal:
            cells = ["not possible", *[""] * 5]
        verdict = [] if known is None else ["" if mode.fits is None else "yes" if mode.fits else "no"]
        table.add_row(
            f"{'>' if mode.chosen else ' '} {_mode_label(mode)}", *cells, *verdict,
            style="bold" if mode.chosen else "",
        )  # fmt: skip
    return table


def size_label(number: int) -> str:
    """A number of bytes in the largest unit of which it has at least one; '' for 0."""
    for unit, name in _UNITS:
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number} B" if number else ""


def count_label(number: int) -> str:
    """A number of parameters in thousands, millions or billions."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return str(number)


def time_label(hours: float) -> str:
    """A time in the largest fitting unit: days, hours, minutes or seconds."""
    for unit, name in ((24.0, "d"), (1.0, "h"), (1 / 60, "min")):
        if hours >= unit:
            return f"{hours / unit:.1f} {name}"
    return f"{hours * 3600:.0f} s"


def _mode_label(mode: ModeMemory) -> str:
    return mode.sharding if mode.offload == "none" else f"{mode.sharding}, {mode.offload}"


def _model(model: ModelPlan | None) -> list[str]:
    if model is None:
        return []
    return [
        f"model       {model.path} ({model.family}, {model.dtype})",
        f"layers      {model.moe_layers} with experts of {model.decoder_layers}, "
        f"{experts_label(model.num_experts)} experts each, top-{experts_label(model.top_k)}",
        f"parameters  {count_label(model.parameters)}: {count_label(model.expert_parameters)} in experts, "
        f"{count_label(model.parameters - model.expert_parameters)} else; "
        f"{count_label(model.active_parameters)} active a token; {size_label(model.bytes)}",
    ]


def _tasks(tasks: Sequence[TaskPlan]) -> list[str]:
    return [
        f"task        {task.name} ({task.kind}, {task.metric}{_searched(task)}): "
        + ", ".join(f"{number} {split}" for split, number in task.examples.items())
        + task.resolution
        for task in tasks
    ]


def _searched(task: TaskPlan) -> str:
    return "" if task.search_metric == task.metric else f"; the search maximises {task.search_metric}"


def _search(search: SearchPlan | None) -> list[str]:
    if search is None:
        return []
    kind = "prunings, then merges" if search.merges else "prunings only"
    return [
        f"search      {search.algorithm}, keeps {_kept_label(search)}, {kind}; "
        f"{_number_label(search.log10_prunings)} prunings to choose from",
        *_front(search),
        "evaluations at most " + ", ".join(f"{number} {split}" for split, number in search.evaluations.items()),
        *_finalists(search),
    ]


def _finalists(search: SearchPlan) -> list[str]:
    if not search.recovered_finalists:
        return []
    return [
        f"finalists   {search.recovered_finalists} are recovered for {search.recovery_evaluations} of these search "
        f"evaluations; each takes {size_label(search.recovery_bytes)} beside the model and activations"
    ]


def _front(search: SearchPlan) -> list[str]:
    if len(search.objectives) == 1 and search.objectives != ("tasks",):
        return []
    top_k = "" if search.top_k_range is None else f"; top_k {search.top_k_range[0]} to {search.top_k_range[1]} a layer"
    return [f"objectives  {', '.join(search.objectives)}{top_k}; the result is a front"]


def _kept_label(search: SearchPlan) -> str:
    if search.num_kept_range is None:
        return experts_label(search.num_kept)
    fewest, most = search.num_kept_range
    mean = "" if "parameters" in search.objectives else f", {experts_label(search.num_kept)} on average"
    return f"{fewest} to {most} a layer{mean}"


def _number_label(log10: float) -> str:
    """A number given by its logarithm to base 10; a large one as a power of ten."""
    return f"{round(10**log10):,}" if log10 < 12 else f"10^{log10:.0f}"


def _on_top(memory: MemoryPlan) -> list[str]:
    lines = [
        f"on top      logits of a batch at most {size_label(memory.logits_bytes)}, activations roughly "
        f"{size_label(memory.activations_bytes)}"
    ]
    if memory.chosen.merged_bytes:
        lines.append(
            f"            merged layers of one genome {size_label(memory.chosen.merged_bytes)}; what finds no room is "
            "merged in every forward pass"
        )
    return lines


def _checkpoint(checkpoint: CheckpointPlan | None) -> list[str]:
    if checkpoint is None:
        return []
    return [
        f"export      {count_label(checkpoint.parameters)} parameters, {size_label(checkpoint.bytes)} "
        f"{_most(checkpoint)}({loader_label(checkpoint.loader)})"
    ]


def _recovery(recovery: RecoveryPlan | None) -> list[str]:
    if recovery is None:
        return []
    blocks = f" and {size_label(recovery.block_bytes)} of layers' outputs" if recovery.block_bytes else ""
    return [
        f"recovery    {recovery.prompts:,} prompts, up to {recovery.positions:,} tokens with answers and validation: "
        f"{size_label(recovery.lesson_bytes)} of lessons{blocks} on disk; "
        f"{_training(recovery)} takes {size_label(recovery.training_bytes)}{_offloaded(recovery)} beside activations"
    ]


def _training(recovery: RecoveryPlan) -> str:
    return f"training {recovery.trained_numbers:,} numbers" if recovery.trained_numbers else "the pruned model"


def _offloaded(recovery: RecoveryPlan) -> str:
    """What each of several workers takes elsewhere than on its device."""
    host = f", {size_label(recovery.host_bytes)} of its host's memory" if recovery.host_bytes else ""
    disk = f", {size_label(recovery.disk_bytes)} of disk" if recovery.disk_bytes else ""
    return f"{host}{disk}" if recovery.workers == 1 else f"{host}{disk} for each of {recovery.workers} workers,"


def _most(checkpoint: CheckpointPlan) -> str:
    most = checkpoint.most_parameters
    return "" if most is None else f"at the least and {count_label(most)} parameters at the most "


def _cluster(cluster: ClusterPlan | None) -> list[str]:
    if cluster is None:
        return []
    nodes = f"{cluster.nodes} node{'s' * (cluster.nodes != 1)}"
    return [
        f"cluster     {nodes}; gangs of {cluster.needs}: {cluster.gangs_free} fit now, "
        f"{cluster.gangs_whole} when all is free"
    ]


def _estimate(estimate: Estimate | None) -> list[str]:
    if estimate is None:
        return []
    parts = ", ".join(f"{split} {time_label(hours)}" for split, hours in estimate.hours.items())
    return [
        f"speed       {estimate.evaluation_s:.3g} s an evaluation, {estimate.gangs} at a time: "
        f"{estimate.evaluations_per_h:.0f} evaluations an hour",
        f"time        {time_label(estimate.total_h)} ({parts})",
    ]


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True, style=style)

"""Prints the commands' results on a terminal: tables, the picture of kept experts, and next commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_evo.config.task import SPLITS, fitness_label
from moe_evo.genomes.file import load_genome
from moe_evo.records.folder import RunFolder
from moe_evo.records.paired import Paired
from moe_evo.records.result import GangFacts, RunResult, Score
from moe_evo.report.answers import (
    CarvedModel,
    CompressedModel,
    ExportedRun,
    MethodFacts,
    Progress,
    PrunedModel,
    RecoveredModel,
    ScoredGenome,
    WrittenReport,
)
from moe_evo.report.front import export_line, front_table
from moe_evo.report.screen import screen
from moe_evo.report.table import experts_label, final_table, kept_picture, loader_label, print_whole
from moe_evo.report.task_scores import interval_label, tasks_table
from moe_evo.report.verdict import compared, remarks


def print_run(folder: RunFolder, told: RunResult | Progress) -> None:
    """Print a finished run's table, kept experts, files and next commands, or an unfinished run's progress."""
    if isinstance(told, Progress):
        _print_progress(folder, told)
    else:
        _print_result(folder, told)


def _print_progress(folder: RunFolder, progress: Progress) -> None:
    best, label = progress.best_fitness, fitness_label(progress.config.tasks)
    screen().print(
        f"{folder.path}: {progress.evaluations} of {progress.budget} evaluations done, "
        f"{progress.failed.failures} failed, best {label} {'none yet' if best is None else f'{best:.4f}'}\n"
        f"{_reasons(progress.failed.failure_reasons)}{_gangs(progress.gangs)}"
        f"go on with: moe-evo search --resume {folder.path}",
        highlight=False,
        soft_wrap=True,
    )


def _print_result(folder: RunFolder, result: RunResult) -> None:
    console = screen()
    print_whole(console, final_table(result))
    if len(result.tasks) > 1:
        print_whole(console, tasks_table(result))
    if result.front:
        print_whole(console, front_table(result))
    winner = load_genome(folder.best)
    console.print(kept_picture(winner, result.model.decoder_layers))
    search = result.search
    stopped = f", {search.stopped_early} stopped early" if search.stopped_early else ""
    console.print(
        f"{search.evaluations} evaluations ({search.failures} failed{stopped}), seed {search.seed}, "
        f"{search.evaluation_s:.0f} s of evaluation\n"
        f"{_examples(result)}{_reasons(search.failure_reasons)}{_gangs(result.gangs)}"
        f"{_remarks(result)}{_finalists(result)}{_expected(result)}{_soup(result)}{_front(folder, result)}"
        f"pictures {folder.figure}, {folder.kept_figure}\n"
        f"genome   {folder.best}\n"
        f"result   {folder.result}\n"
        f"next     {_next_step(folder, result, is_pruning=winner.is_pruning)}{_recovery(folder, result)}",
        highlight=False,
        soft_wrap=True,
    )


def print_check(name: str, state: str, detail: str) -> None:
    """Print one line of `moe-evo doctor`."""
    color = {"ok": "green", "note": "yellow", "absent": "dim", "broken": "red"}[state]
    line = Text.assemble((f"{state:<8}", color), f"{name:<20}{detail}")
    screen().print(line, highlight=False, soft_wrap=True)


def _reasons(reasons: Sequence[str]) -> str:
    return "".join(f"failed   {reason}\n" for reason in reasons)


def _examples(result: RunResult) -> str:
    """The number of examples behind the table's scores, for all tasks together."""
    counts = {split: sum(task.examples[split] for task in result.tasks) for split in SPLITS}
    return f"examples {', '.join(f'{count} {split}' for split, count in counts.items())}\n"


def _soup(result: RunResult) -> str:
    """Which genome is exported, where there are two to choose from."""
    soup = result.row("soup")
    if soup is None:
        return ""
    return f"exported is {result.best.title}, the last row; with --which soup it is the {soup.title}\n"


def _front(folder: RunFolder, result: RunResult) -> str:
    """How a point of the front is exported."""
    can_be = result.front and result.runs_stock_experts
    return f"a point  {export_line(folder.path, result)}\n" if can_be else ""


def _gangs(gangs: GangFacts | None) -> str:
    """How often gangs of a run on a cluster were loaded, and why they broke."""
    if gangs is None:
        return ""
    lines = [f"gangs    loaded {gangs.counts.get('ready', 0)} times, broken {gangs.counts.get('broken', 0)} times"]
    return "\n".join([*lines, *(f"broken   {reason}" for reason in gangs.reasons)]) + "\n"


def _remarks(result: RunResult) -> str:
    """What the table means, in words."""
    return "".join(f"{name:<9}{sentence}\n" for name, sentence in remarks(result))


def _finalists(result: RunResult) -> str:
    """Which finalists were recovered before the winner was chosen."""
    return "" if result.finalists is None else f"finalists {result.finalists}\n"


def _expected(result: RunResult) -> str:
    """What new examples can be expected to show, where the best of several validation scores is partly luck."""
    validation = result.best.validation
    if result.expected is None or validation is None:
        return ""
    chosen_by = f"{validation.fitness:.3f} on the validation split, by which it was chosen, is partly luck"
    return f"expected {result.expected:.3f} of the winner on new examples ({chosen_by})\n"


def _next_step(folder: RunFolder, result: RunResult, *, is_pruning: bool) -> str:
    target = folder.path / "checkpoint"
    exportable = is_pruning or result.router == "exported"  # no stock router can express merges in router mode 'eep'
    if target.exists() or not result.runs_stock_experts or not (exportable or folder.best_pruning.is_file()):
        return f"moe-evo evaluate {folder.path} --split test"
    which = "" if exportable else " --which best_pruning"
    return f"moe-evo export {folder.path} --to {target}{which}"


def _recovery(folder: RunFolder, result: RunResult) -> str:
    """The command with which the winner learns from the full model, where there is none yet that did and it can."""
    can = result.runs_stock_experts and result.router == "exported" and result.best.loader == "transformers"
    is_whole = result.best.num_kept == result.full.num_kept
    if result.recovered or is_whole or not can:
        return ""
    return f"\n         moe-evo recover {folder.path} --to {folder.path / 'recovered'}"


def print_scores(scored: ScoredGenome) -> None:
    """Print one genome's scores on one split."""
    console, score = screen(), scored.score
    console.print(
        f"{scored.genome}: {score.fitness:.4f} ({score.low:.4f} to {score.high:.4f}) on "
        f"{score.num_examples} {scored.split} examples, {experts_label(scored.num_kept)} experts a layer",
        highlight=False,
        soft_wrap=True,
    )
    for name, value in sorted(score.metrics.items()):
        console.print(f"  {name}: {value:.4f}", highlight=False)
    told = [*scored.remarks, *([] if scored.samples is None else [("samples", str(scored.samples))])]
    for name, sentence in told:
        console.print(f"{name:<9}{sentence}", highlight=False, markup=False, soft_wrap=True)


def print_export(exported: ExportedRun | PrunedModel | CompressedModel | RecoveredModel | CarvedModel) -> None:
    """Print where the checkpoint is, its size, and how well its logits agree with the evaluated ones."""
    report, mib = exported.report, 2**20
    which = f"exported    {exported.title} ({exported.which} of the run)\n" if isinstance(exported, ExportedRun) else ""
    screen().print(
        f"{which}"
        f"checkpoint  {report.folder} ({loader_label(report.loader)})\n"
        f"parameters  {report.parameters_before:,} -> {report.parameters_after:,}\n"
        f"on disk     {report.bytes_before / mib:.1f} MiB -> {report.bytes_after / mib:.1f} MiB\n"
        f"reloaded    logits differ by at most {report.max_logit_difference:.1e} from what was evaluated",
        highlight=False,
        soft_wrap=True,
    )


def print_one_shot(pruned: PrunedModel) -> None:
    """Print which experts a one-shot method kept or merged, and the scores."""
    console = screen()
    for layer, slots in enumerate(pruned.made_of):
        verb = "keeps" if all(len(members) == 1 for members in slots) else "merges"
        experts = ", ".join("+".join(map(str, members)) for members in slots)
        console.print(f"layer {layer:3}   {verb} {experts}", highlight=False, soft_wrap=True)
    _print_scores_of_models(console, pruned.scores)
    lines = [f"{'genome':<12}{pruned.genome}"]
    if pruned.alignment is not None:
        lines.append(f"{'alignment':<12}{pruned.alignment}")
    if pruned.dynamic_skipping_beta is not None:
        thresholds = ", ".join(f"{one:.3f}" for one in pruned.dynamic_skipping_beta)
        lines.append(f"skipping    --model.dynamic_skipping '[{thresholds}]' (evaluates only; no checkpoint holds it)")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _print_scores_of_models(console: Console, scores: Mapping[str, Score]) -> None:
    width = max(map(len, scores)) + len(" model  ")
    for name, score in scores.items():
        where = f"on {score.num_examples} examples of the test split"
        line = f"{name + ' model':{width}}{score} {where} (95 % interval)"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_compression(compressed: CompressedModel) -> None:
    """Print how the experts were compressed, their reconstruction errors, the scores, and the compressed size."""
    console = screen()
    table = Table(box=None, pad_edge=False)
    for column in ("MoE layer", "relative error", "weighted by inputs", "experts that saw no token"):
        table.add_column(column, justify="right")
    for number, layer in enumerate(compressed.layers):
        weighted = layer.weighted_error
        cells = ("", "") if weighted is None else (f"{weighted:.4f}", str(layer.num_idle))
        table.add_row(str(number), f"{layer.relative_error:.4f}", *cells)
    print_whole(console, table)
    _print_scores_of_models(console, compressed.scores)
    experts, mib = compressed.experts, 2**20
    share = experts.num_nonzero / experts.num_weights
    lines = [
        f"experts     {compressed.description}",
        f"not zero    {experts.num_nonzero:,} of {experts.num_weights:,} weights of experts ({share:.1%})",
        f"as written  {experts.dense_bytes / mib:.2f} MiB of experts, as before: they are stored densely",
    ]
    for way, packed in experts.packed_bytes.items():
        larger = ", more than densely" if packed > experts.dense_bytes else ""
        ratio = packed / experts.dense_bytes
        lines.append(f"would take  {packed / mib:.2f} MiB as {way} ({ratio:.1%} of dense{larger})")
    lines.append(f"that needs  {compressed.needs}")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def print_carving(carved: CarvedModel) -> None:
    """Print the experts of an MoE made of a dense model, how far its layers are from the dense ones, and the scores."""
    console = screen()
    if carved.layers:
        table = Table(box=None, pad_edge=False)
        for column in ("layer", "relative error", "with the best experts"):
            table.add_column(column, justify="right")
        for number, layer in enumerate(carved.layers):
            table.add_row(str(number), f"{layer.relative_error:.3f}", f"{layer.best_error:.3f}")
        print_whole(console, table)
    _print_scores_of_models(console, carved.scores)
    shared = f", and a shared one of {carved.shared_size}" if carved.shared_size else ""
    lines = [
        f"experts     {carved.num_experts} of {carved.expert_size} neurons in each layer, {carved.top_k} active"
        f"{shared} ({carved.family})",
        f"all active  logits differ by at most {carved.all_active_difference:.1e} from the dense model's",
        f"a token     meets {carved.active_parameters:,} of {carved.report.parameters_after:,} parameters",
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def print_recovery(recovered: RecoveredModel) -> None:
    """Print the scores of the full, the pruned and the recovered model, and what the recovery gained and cost."""
    console, facts = screen(), recovered.facts
    _print_scores_of_models(console, facts.scores)
    lines = [
        f"gained      {interval_label(facts.gained)} over the pruned model, on the same examples (95 % interval)",
        f"missing     {compared(Paired(facts.missing), 'the recovered model', 'the full model')}",
        f"learned     {facts.prompts:,} prompts with their answers, {facts.positions:,} tokens",
        *(f"{stage.method:<12}{stage.in_words}" for stage in facts.stages),
        f"verdict     {facts.verdict}",
        f"picture     {recovered.figure}",
        f"next        moe-evo evaluate --model.path {recovered.folder} --split test",
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def print_criteria(methods: Sequence[MethodFacts]) -> None:
    """Print each method's description and under it its source, wrapped to the width of the terminal."""
    table = Table(box=None, pad_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("keeps the experts with the highest, or what else it does")
    for one in methods:
        table.add_row(one.name, one.description)
        table.add_row("", one.source, style="dim")
    screen().print(table)


def print_report(written: WrittenReport) -> None:
    """Print where the page is, and what to do next."""
    console = screen()
    path = Path(written.report).resolve()
    runs = f"{written.runs} run{'s' * (written.runs != 1)}"
    lines = [f"report   {written.report} ({runs}, {written.bytes / 2**20:.1f} MiB, needs no network)"]
    lines += [f"         {folder} is not finished: go on, then write the report again" for folder in written.unfinished]
    lines.append(f"next     open {path.as_uri()} in a browser, or send the file to somebody")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)

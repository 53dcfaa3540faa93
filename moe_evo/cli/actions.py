"""One action for each command: parse the command line, call the command's function, print what it returns.

Those that write a checkpoint stand in `checkpoint_actions`. Each action imports what it calls, so that slow imports are
made only for the commands that need them.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_evo.cli.checkpoint_actions import (
    carve_action,
    compress_action,
    export_action,
    print_recovered,
    prune_action,
    recover_action,
)
from moe_evo.cli.starting import start, tell_imports
from moe_evo.cli.task_command import tasks_action
from moe_evo.errors import ConfigError
from moe_evo.plain import plain
from moe_evo.shown import printable

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from moe_evo.config.parser import CommandParser
    from moe_evo.config.recover import RecoveryConfig
    from moe_evo.config.run import RunConfig
    from moe_evo.records.sweep import SweepFolder, SweepResult


def _note(line: str) -> None:
    print(f"moe-evo: note: {printable(line)}", file=sys.stderr)


def _search(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.commands.search import search
    from moe_evo.config.file import parse_config
    from moe_evo.config.run import RunConfig
    from moe_evo.records.folder import resumed_config
    from moe_evo.tracking.terminal import TerminalTracker

    arguments, config = parse_config(parser, argv, RunConfig, _note)
    if arguments.resume is not None:
        if len(parser.words(argv)) > 1:
            raise ConfigError("--resume: got other options beside it, expected none: a run keeps its config")
        config = resumed_config(arguments.resume)
    start(config)
    recovery = _recovery(config, arguments)
    recovered = None
    with TerminalTracker() as tracker:
        folder = search(config, tracker)
        if recovery is not None:
            from moe_evo.commands.recover import recover

            aim, target = recovery
            recovered = recover(aim, str(folder.path), target, "best", overwrite=False, tracker=tracker)
    _print_run(str(folder.path), as_json=as_json)
    if recovered is not None and not as_json:
        print_recovered(recovered)


def _recovery(config: RunConfig, arguments: Namespace) -> tuple[RecoveryConfig, Path] | None:
    """How the winner of a search is to learn, and where its checkpoint goes; None without --recover."""
    if not arguments.and_recover:
        return None
    from moe_evo.commands.recovery_input import of_winner

    return of_winner(config, arguments.recover)


def _sweep(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.commands.sweep import sweep
    from moe_evo.config.file import parse_config
    from moe_evo.config.sweep import SweepConfig
    from moe_evo.tracking.terminal import TerminalTracker

    arguments, config = parse_config(parser, argv, SweepConfig)
    start(config)
    with TerminalTracker() as tracker:
        folder = sweep(config, tracker, use_tune=not arguments.no_tune)
    _print_sweep(folder, folder.read_result(), as_json=as_json)


def _plan(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.commands.plan import planned, require_no_problems
    from moe_evo.config.file import parse_config
    from moe_evo.config.run import RunConfig
    from moe_evo.tracking.terminal import TerminalTracker

    arguments, config = parse_config(parser, argv, RunConfig, _note)
    tell_imports()
    with TerminalTracker() as tracker:
        recover = arguments.recover if arguments.and_recover else None
        answer = planned(config, arguments.memory_gib, recover, calibrate=arguments.calibrate, tracker=tracker)
    if as_json:
        print(json.dumps(plain(answer)))
    else:
        from moe_evo.report.plan import print_plan

        print_plan(answer, shlex.join(["moe-evo", "search", *_without(argv, "--memory_gib", "--calibrate")]))
    require_no_problems(answer)


def _show(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.config.file import parse
    from moe_evo.records.sweep import SweepFolder

    run = parse(parser, argv).run
    sweep = SweepFolder(Path(run))
    if sweep.is_sweep:
        from moe_evo.commands.show import show_sweep

        _print_sweep(sweep, show_sweep(sweep), as_json=as_json)
    else:
        _print_run(run, as_json=as_json)


def _print_sweep(folder: SweepFolder, result: SweepResult, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(plain(result)))
    else:
        from moe_evo.report.sweep import print_sweep

        print_sweep(result)
        told = [f"figure   {folder.figure}", f"result   {folder.result}"] if folder.result.is_file() else []
        told += [f"         {name} is not finished" for name in result.unfinished]
        told.append(f"next     moe-evo report {folder.path}")
        print(printable("\n".join(told)))


def _print_run(run: str, *, as_json: bool) -> None:
    from moe_evo.commands.show import show
    from moe_evo.records.folder import RunFolder

    folder = RunFolder.existing(run)
    result = show(folder)
    if as_json:
        print(json.dumps(plain(result)))
    else:
        from moe_evo.report.terminal import print_run

        print_run(folder, result)


def _evaluate(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.commands.evaluate import evaluate
    from moe_evo.config.file import parse_config
    from moe_evo.config.run import ScoringConfig
    from moe_evo.tracking.terminal import TerminalTracker

    given = (word.value for word in parser.words(argv) if word.option in (None, "config", "genome") and word.value)
    names = (name for name in given if not name.lstrip().startswith(("[", "{", "-")) and len(name) < 256)
    run = next((name for name in names if (Path(name) / "config.yaml").is_file()), None)
    has_config = (argv[:1] and not argv[0].startswith("-")) or any(word.startswith("--config") for word in argv)
    # a run's genome without a config is scored with the run's own model and tasks
    words = list(argv) if has_config or run is None else [run, *argv]
    arguments, config = parse_config(parser, words, ScoringConfig)
    genome = (run or "full") if arguments.genome is None else arguments.genome
    start(config)
    with TerminalTracker() as tracker:
        scores = evaluate(
            config,
            genome,
            arguments.split,
            arguments.top_k,
            run,
            tracker,
            baseline=arguments.baseline,
            samples=None if arguments.samples is None else Path(arguments.samples),
        )
    if as_json:
        print(json.dumps(plain(scores)))
    else:
        from moe_evo.report.terminal import print_scores

        print_scores(scores)


def _compare(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.config.file import parse
    from moe_evo.report.lines import as_csv, print_lines
    from moe_evo.report.pairing import print_pairings
    from moe_evo.report.spread import print_spreads
    from moe_evo.report.write import compare

    arguments = parse(parser, argv)
    if arguments.format == "csv" and not as_json:
        sys.stdout.write(as_csv(compare(arguments.runs, in_pairs=False).lines))
        return
    found = compare(arguments.runs)
    if as_json or arguments.format == "json":
        print(json.dumps(plain(found)))
    else:
        print_lines(found.lines)
        print_spreads(found.spread)
        print_pairings(found.paired)


def _report(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.config.file import parse
    from moe_evo.report.write import write_report

    arguments = parse(parser, argv)
    written = write_report(arguments.runs, arguments.to, overwrite=arguments.overwrite)
    if as_json:
        print(json.dumps(plain(written)))
    else:
        from moe_evo.report.terminal import print_report

        print_report(written)


def _criteria(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.commands.prune import criteria
    from moe_evo.config.file import parse

    parse(parser, argv)
    found = criteria()
    if as_json:
        print(json.dumps(plain(found)))
    else:
        from moe_evo.report.terminal import print_criteria

        print_criteria(found)


def _doctor(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.commands.doctor import checks, require_nothing_broken
    from moe_evo.config.file import parse
    from moe_evo.report.terminal import print_check

    parse(parser, argv)
    found = []
    for check in checks():
        found.append(check)
        if not as_json:
            print_check(check.name, check.state, check.detail)
    if as_json:
        print(json.dumps({"checks": plain(found)}))
    require_nothing_broken(found)


def _wandb_replay(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    from dataclasses import asdict, replace

    from moe_evo.config.file import parse, read_config
    from moe_evo.records.folder import RunFolder
    from moe_evo.tracking.start import replay

    folder = RunFolder.existing(parse(parser, argv).run)
    config = read_config(folder.config)
    parser.set_defaults({f"tracking.{key}": value for key, value in asdict(config.tracking).items()})
    report = replay(folder, replace(config, tracking=parse(parser, argv).tracking))
    if as_json:
        print(json.dumps(plain(report)))
    else:
        old = f"; the older run {report.replaced_id} is left as it is" if report.replaced_id else ""
        print(printable(f"{report.outcomes} outcomes in the W&B run {report.id} ({report.mode}){old}\n{report.where}"))


ACTIONS: dict[str, Callable[..., None]] = {
    "search": _search,
    "sweep": _sweep,
    "plan": _plan,
    "tasks": tasks_action,
    "evaluate": _evaluate,
    "prune": prune_action,
    "recover": recover_action,
    "compress": compress_action,
    "carve": carve_action,
    "criteria": _criteria,
    "show": _show,
    "compare": _compare,
    "report": _report,
    "export": export_action,
    "wandb-replay": _wandb_replay,
    "doctor": _doctor,
}


def _without(words: Sequence[str], *options: str) -> list[str]:
    """The words of a command line without these options and their values."""
    kept: list[str] = []
    is_dropped = False
    for word in words:
        if word.startswith("-"):
            is_dropped = word.split("=")[0] in options
        if not is_dropped:
            kept.append(word)
    return kept

"""One action for each command: parse the command line, call the command's function, print what it returns.

Each action imports what it calls, so that slow imports are made only for the commands that need them.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_evo.errors import ConfigError
from moe_evo.plain import plain

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from moe_evo.config.parser import CommandParser
    from moe_evo.config.recover import RecoveryConfig
    from moe_evo.config.run import RunConfig, ScoringConfig
    from moe_evo.report.answers import RecoveredModel


def _note(line: str) -> None:
    print(f"moe-evo: note: {line}", file=sys.stderr)


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
        _print_recovered(recovered)


def _recovery(config: RunConfig, arguments: Namespace) -> tuple[RecoveryConfig, Path] | None:
    """How the winner of a search is to learn, and where its checkpoint goes; None without --recover."""
    if not arguments.and_recover:
        return None
    from moe_evo.commands.recovery_input import of_winner

    return of_winner(config, arguments.recover)


def _print_recovered(recovered: RecoveredModel) -> None:
    from moe_evo.report.terminal import print_export, print_recovery

    print_recovery(recovered)
    print_export(recovered)


def _sweep(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.commands.sweep import sweep
    from moe_evo.config.file import parse_config
    from moe_evo.config.sweep import SweepConfig
    from moe_evo.tracking.terminal import TerminalTracker

    arguments, config = parse_config(parser, argv, SweepConfig)
    with TerminalTracker() as tracker:
        folder = sweep(config, tracker, use_tune=not arguments.no_tune)
    result = folder.read_result()
    if as_json:
        print(json.dumps(plain(result)))
    else:
        from moe_evo.report.sweep import print_sweep

        print_sweep(result)
        print(f"figure   {folder.figure}\nresult   {folder.result}")
        print(f"next     moe-evo report {folder.path}/runs/* --to {folder.path}/report.html")


def _plan(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.commands.plan import planned, require_no_problems
    from moe_evo.config.file import parse_config
    from moe_evo.config.run import RunConfig
    from moe_evo.tracking.terminal import TerminalTracker

    arguments, config = parse_config(parser, argv, RunConfig, _note)
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

    _print_run(parse(parser, argv).run, as_json=as_json)


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
    genome = arguments.genome or run or "full"
    with TerminalTracker() as tracker:
        scores = evaluate(config, genome, arguments.split, arguments.top_k, run, tracker)
    if as_json:
        print(json.dumps(plain(scores)))
    else:
        from moe_evo.report.terminal import print_scores

        print_scores(scores)


def _compare(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.config.file import parse
    from moe_evo.report.lines import as_csv, print_lines
    from moe_evo.report.pairing import print_pairings
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


def _export(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.commands.export import export
    from moe_evo.config.file import parse
    from moe_evo.records.folder import RunFolder
    from moe_evo.tracking.terminal import TerminalTracker

    arguments = parse(parser, argv)
    folder = RunFolder.existing(arguments.run)
    with TerminalTracker() as tracker:
        report = export(
            folder,
            Path(arguments.to),
            arguments.which,
            arguments.device,
            overwrite=arguments.overwrite,
            tracker=tracker,
            model_path=arguments.model.path,
        )
    if as_json:
        print(json.dumps(plain(report)))
    else:
        from moe_evo.report.terminal import print_export

        print_export(report)


def _prune(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    from dataclasses import fields

    from moe_evo.commands.prune import PruneOptions, prune
    from moe_evo.config.file import parse_config
    from moe_evo.config.run import ScoringConfig
    from moe_evo.tracking.terminal import TerminalTracker

    arguments, config = parse_config(parser, argv, ScoringConfig)
    given = {one.name: getattr(arguments, one.name) for one in fields(PruneOptions)}
    if given["observations"] is not None:
        given["observations"] = Path(given["observations"])
    target = Path(arguments.to)
    recovery, recovered = _recovery_of_pruned(config, arguments), None
    with TerminalTracker() as tracker:
        report = prune(config, PruneOptions(**given), target, overwrite=arguments.overwrite, tracker=tracker)
        if recovery is not None:
            from moe_evo.commands.recover import recover

            aim, folder = recovery
            recovered = recover(aim, str(target), folder, "best", overwrite=arguments.overwrite, tracker=tracker)
    if as_json:
        print(json.dumps(plain(report) | ({} if recovered is None else {"recovered": plain(recovered)})))
    else:
        from moe_evo.report.terminal import print_export, print_one_shot

        print_one_shot(report)
        print_export(report)
        if recovered is not None:
            _print_recovered(recovered)


def _recovery_of_pruned(config: ScoringConfig, arguments: Namespace) -> tuple[RecoveryConfig, Path] | None:
    """How a pruned model is to learn, and where its checkpoint goes; None without --recover."""
    if not arguments.and_recover:
        return None
    from moe_evo.commands.recovery_input import of_pruned

    return of_pruned(config, arguments.recover, Path(arguments.to), overwrite=arguments.overwrite)


def _recover(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.commands.recover import recover
    from moe_evo.commands.recovery_input import is_run
    from moe_evo.config.file import parse_config
    from moe_evo.config.recover import RecoveryConfig
    from moe_evo.tracking.terminal import TerminalTracker

    words = list(argv)
    if argv and not argv[0].startswith("-"):
        # the first bare word is the pruned model; with a run comes its config, and else the second word may be one
        words = [*argv[1:], argv[0]]
        if is_run(Path(argv[0])):
            words = [argv[0], *words]
    arguments, config = parse_config(parser, words, RecoveryConfig)
    with TerminalTracker() as tracker:
        recovered = recover(
            config, arguments.pruned, Path(arguments.to), arguments.which, overwrite=arguments.overwrite,
            tracker=tracker,
        )  # fmt: skip
    if as_json:
        print(json.dumps(plain(recovered)))
    else:
        _print_recovered(recovered)


def _compress(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    from dataclasses import fields, replace

    from moe_evo.commands.compress import CompressOptions, compress
    from moe_evo.config.file import parse_config
    from moe_evo.config.run import ScoringConfig
    from moe_evo.tracking.terminal import TerminalTracker

    if any(word.split("=")[0] == "--model.path" for word in argv):
        raise ConfigError("--model.path: got it beside CHECKPOINT, which is the model; expected one of them")
    # the first bare word is the model, and the second one may be a config
    words = [*argv[1:], argv[0]] if argv and not argv[0].startswith("-") else argv
    arguments, config = parse_config(parser, words, ScoringConfig)
    options = CompressOptions(**{one.name: getattr(arguments, one.name) for one in fields(CompressOptions)})
    config = replace(config, model=replace(config.model, path=arguments.checkpoint))
    with TerminalTracker() as tracker:
        report = compress(config, options, Path(arguments.to), overwrite=arguments.overwrite, tracker=tracker)
    if as_json:
        print(json.dumps(plain(report)))
    else:
        from moe_evo.report.terminal import print_compression, print_export

        print_compression(report)
        print_export(report)


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
        print(f"{report.outcomes} outcomes in the W&B run {report.id} ({report.mode}){old}\n{report.where}")


ACTIONS: dict[str, Callable[..., None]] = {
    "search": _search,
    "sweep": _sweep,
    "plan": _plan,
    "evaluate": _evaluate,
    "prune": _prune,
    "recover": _recover,
    "compress": _compress,
    "criteria": _criteria,
    "show": _show,
    "compare": _compare,
    "report": _report,
    "export": _export,
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

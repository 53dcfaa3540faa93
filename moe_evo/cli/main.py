"""The command line: parsing, printing and exit codes. Nothing heavy is imported before it is needed.

Exit codes: 0 done; 2 the input was wrong (one line says how); 3 the cluster failed, the same command again
goes on; 130 interrupted; 1 a defect of ours.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from moe_evo.errors import ClusterError, ConfigError, MoeEvoError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_USAGE = "moe-evo COMMAND ...  (--help after each command tells its options)"
_DESCRIPTION = """Find by evolution which experts of a Mixture-of-Experts model a task needs; export the smaller model.

  moe-evo search                              try it on the embedded model and task
  moe-evo search CONFIG.yaml --search.num_kept 4
  moe-evo sweep CONFIG.yaml --sweep.num_kept 2,4,6 --sweep.seeds 0,1,2
  moe-evo plan CONFIG.yaml                    memory, gangs and time of a search, and what is wrong with it
  moe-evo show RUN                            what a run found, as table and picture
  moe-evo compare RUN...                      the tables of several runs as one, also as CSV or JSON
  moe-evo report RUN... --to report.html      everything about runs on one interactive page
  moe-evo evaluate RUN --split test           score its winner, or any --genome, on any split
  moe-evo export RUN --to DIR                 a checkpoint that stock transformers loads
  moe-evo prune --method reap --num_kept 4 --to DIR   without a search, by a one-shot criterion
  moe-evo compress CHECKPOINT --method moe_pruner --to DIR   sparse or low-rank experts
  moe-evo criteria                            the one-shot criteria
  moe-evo wandb-replay RUN                    write a run of W&B from the journal of a search
  moe-evo doctor                              versions, GPU, memory, and whether what a run relies on holds here
"""


def _search(parser: ArgumentParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo import commands
    from moe_evo.config import RunConfig
    from moe_evo.config_file import parse_config
    from moe_evo.tracking.terminal import TerminalTracker

    arguments, config = parse_config(parser, argv, RunConfig)
    if arguments.resume is not None:
        if len(argv) > 2 or sum(word.startswith("-") for word in argv) > 1:
            raise ConfigError("--resume: got other options beside it, expected none: a run keeps its config")
        config = commands.resumed_config(arguments.resume)
    with TerminalTracker() as tracker:
        folder = commands.search(config, tracker)
    _print_run(str(folder.path), as_json=as_json)


def _sweep(parser: ArgumentParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.config_file import parse_config
    from moe_evo.sweep import sweep
    from moe_evo.sweep_config import SweepConfig
    from moe_evo.tracking.terminal import TerminalTracker

    arguments, config = parse_config(parser, argv, SweepConfig)
    with TerminalTracker() as tracker:
        folder = sweep(config, tracker, use_tune=not arguments.no_tune)
    result = folder.read_result()
    if as_json:
        print(json.dumps(result))
    else:
        from moe_evo.report.sweep import print_sweep

        print_sweep(result)
        print(f"figure   {folder.figure}\nresult   {folder.result}")
        print(f"next     moe-evo report {folder.path}/runs/* --to {folder.path}/report.html")


def _plan(parser: ArgumentParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.config import RunConfig
    from moe_evo.config_file import parse_config
    from moe_evo.plan import planned, require_no_problems
    from moe_evo.tracking.terminal import TerminalTracker

    arguments, config = parse_config(parser, argv, RunConfig)
    with TerminalTracker() as tracker:
        answer = planned(config, arguments.memory_gib, calibrate=arguments.calibrate, tracker=tracker)
    if as_json:
        print(json.dumps(answer))
    else:
        from moe_evo.report.plan import print_plan

        print_plan(answer, shlex.join(["moe-evo", "search", *_without(argv, "--memory_gib", "--calibrate")]))
    require_no_problems(answer)


def _show(parser: ArgumentParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.config_file import parse

    _print_run(parse(parser, argv).run, as_json=as_json)


def _print_run(run: str, *, as_json: bool) -> None:
    from moe_evo import commands
    from moe_evo.run_folder import RunFolder

    folder = RunFolder.existing(run)
    result = commands.show(folder)
    if as_json:
        print(json.dumps(result))
    else:
        from moe_evo.report.terminal import print_run

        print_run(folder, result)


def _evaluate(parser: ArgumentParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo import commands
    from moe_evo.config import ScoringConfig
    from moe_evo.config_file import parse_config
    from moe_evo.tracking.terminal import TerminalTracker

    names = (word for word in argv if not word.lstrip().startswith(("[", "{", "-")) and len(word) < 256)
    run = next((name for name in names if (Path(name) / "config.yaml").is_file()), None)
    has_config = (argv[:1] and not argv[0].startswith("-")) or any(word.startswith("--config") for word in argv)
    # a run's genome without a config is scored with the run's own model and tasks
    words = list(argv) if has_config or run is None else [run, *argv]
    arguments, config = parse_config(parser, words, ScoringConfig)
    genome = arguments.genome or run or "full"
    with TerminalTracker() as tracker:
        scores = commands.evaluate(config, genome, arguments.split, arguments.top_k, run, tracker)
    if as_json:
        print(json.dumps(scores))
    else:
        from moe_evo.report.terminal import print_scores

        print_scores(scores)


def _compare(parser: ArgumentParser, argv: Sequence[str], *, as_json: bool) -> None:
    from dataclasses import asdict

    from moe_evo.config_file import parse
    from moe_evo.report.lines import as_csv, print_lines, print_pairings
    from moe_evo.reporting import compare

    arguments = parse(parser, argv)
    if arguments.format == "csv" and not as_json:
        sys.stdout.write(as_csv(compare(arguments.runs, in_pairs=False)[0]))
        return
    lines, paired = compare(arguments.runs)
    if as_json or arguments.format == "json":
        print(json.dumps({"lines": [asdict(line) for line in lines], "paired": [asdict(one) for one in paired]}))
    else:
        print_lines(lines)
        print_pairings(paired)


def _report(parser: ArgumentParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.config_file import parse
    from moe_evo.reporting import write_report

    arguments = parse(parser, argv)
    written = write_report(arguments.runs, arguments.to, overwrite=arguments.overwrite)
    if as_json:
        print(json.dumps(written))
    else:
        from moe_evo.report.terminal import print_report

        print_report(written)


def _export(parser: ArgumentParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo import commands
    from moe_evo.config_file import parse
    from moe_evo.run_folder import RunFolder
    from moe_evo.tracking.terminal import TerminalTracker

    arguments = parse(parser, argv)
    folder = RunFolder.existing(arguments.run)
    with TerminalTracker() as tracker:
        report = commands.export(
            folder,
            Path(arguments.to),
            arguments.which,
            arguments.device,
            overwrite=arguments.overwrite,
            tracker=tracker,
        )
    if as_json:
        print(json.dumps(report))
    else:
        from moe_evo.report.terminal import print_export

        print_export(report)


def _prune(parser: ArgumentParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.config import ScoringConfig
    from moe_evo.config_file import parse_config
    from moe_evo.one_shot import prune
    from moe_evo.tracking.terminal import TerminalTracker

    arguments, config = parse_config(parser, argv, ScoringConfig)
    observations = None if arguments.observations is None else Path(arguments.observations)
    with TerminalTracker() as tracker:
        report = prune(
            config,
            arguments.method,
            arguments.num_kept,
            Path(arguments.to),
            observations,
            arguments.allocation,
            blend=arguments.blend,
            progressive=arguments.progressive,
            base_model=arguments.base_model,
            aligned=arguments.aligned,
            overwrite=arguments.overwrite,
            tracker=tracker,
        )
    if as_json:
        print(json.dumps(report))
    else:
        from moe_evo.report.terminal import print_export, print_one_shot

        print_one_shot(report)
        print_export(report)


def _compress(parser: ArgumentParser, argv: Sequence[str], *, as_json: bool) -> None:
    from dataclasses import fields, replace

    from moe_evo.compress import CompressOptions, compress
    from moe_evo.config import ScoringConfig
    from moe_evo.config_file import parse_config
    from moe_evo.tracking.terminal import TerminalTracker

    if any(word.split("=")[0] == "--model.path" for word in argv):
        raise ConfigError("--model.path: got it beside CHECKPOINT, which is the model; expected one of them")
    # the first bare word is the model and not a config, which may be the second
    words = [*argv[1:], argv[0]] if argv and not argv[0].startswith("-") else argv
    arguments, config = parse_config(parser, words, ScoringConfig)
    options = CompressOptions(**{one.name: getattr(arguments, one.name) for one in fields(CompressOptions)})
    config = replace(config, model=replace(config.model, path=arguments.checkpoint))
    with TerminalTracker() as tracker:
        report = compress(config, options, Path(arguments.to), overwrite=arguments.overwrite, tracker=tracker)
    if as_json:
        print(json.dumps(report))
    else:
        from moe_evo.report.terminal import print_compression, print_export

        print_compression(report)
        print_export(report)


def _criteria(parser: ArgumentParser, argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.config_file import parse
    from moe_evo.one_shot import criteria

    parse(parser, argv)
    found = criteria()
    if as_json:
        print(json.dumps(found))
    else:
        from moe_evo.report.terminal import print_criteria

        print_criteria(found)


def _doctor(parser: ArgumentParser, argv: Sequence[str], *, as_json: bool) -> None:
    from dataclasses import asdict

    from moe_evo.config_file import parse
    from moe_evo.doctor import checks, require_nothing_broken
    from moe_evo.report.terminal import print_check

    parse(parser, argv)
    found = []
    for check in checks():
        found.append(check)
        if not as_json:
            print_check(check.name, check.state, check.detail)
    if as_json:
        print(json.dumps({"checks": [asdict(check) for check in found]}))
    require_nothing_broken(found)


def _wandb_replay(parser: ArgumentParser, argv: Sequence[str], *, as_json: bool) -> None:
    from dataclasses import asdict, replace

    from moe_evo.config_file import parse, read_config
    from moe_evo.run_folder import RunFolder
    from moe_evo.tracking.start import replay

    folder = RunFolder.existing(parse(parser, argv).run)
    config = read_config(folder.config)
    parser.set_defaults({f"tracking.{key}": value for key, value in asdict(config.tracking).items()})
    report = replay(folder, replace(config, tracking=parse(parser, argv).tracking))
    if as_json:
        print(json.dumps(report))
    else:
        old = f"; the older run {report['replaced_id']} is left as it is" if report["replaced_id"] else ""
        print(f"{report['outcomes']} outcomes in the W&B run {report['id']} ({report['mode']}){old}\n{report['where']}")


_COMMANDS: dict[str, Callable[..., None]] = {
    "search": _search,
    "sweep": _sweep,
    "plan": _plan,
    "evaluate": _evaluate,
    "prune": _prune,
    "compress": _compress,
    "criteria": _criteria,
    "show": _show,
    "compare": _compare,
    "report": _report,
    "export": _export,
    "wandb-replay": _wandb_replay,
    "doctor": _doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; answers the exit code."""
    if argv is None:  # the process is ours: being told to end, as `ray job stop` does, is an interrupt too
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    words = list(sys.argv[1:] if argv is None else argv)
    debug = _take(words, "--debug")
    as_json = _take(words, "--json")
    try:
        return _dispatch(words, as_json=as_json)
    except MoeEvoError as error:
        return _fail(f"error: {' '.join(str(error).split())}", 3 if isinstance(error, ClusterError) else 2, debug=debug)
    except KeyboardInterrupt:
        kept = (
            "; all finished evaluations are kept, the same command goes on"
            if words[:1] in (["search"], ["sweep"])
            else ""
        )
        return _fail(f"interrupted{kept}", 130, debug=debug)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what is still buffered must not raise at exit
        return 0
    except Exception as error:  # noqa: BLE001 - the border of the process: a defect still ends in one line
        message = f"unexpected {type(error).__name__}: {error}; run again with --debug for the traceback"
        return _fail(message, 1, debug=debug)


def _without(words: Sequence[str], *options: str) -> list[str]:
    """Words without these options and their values."""
    kept: list[str] = []
    is_dropped = False
    for word in words:
        if word.startswith("-"):
            is_dropped = word.split("=")[0] in options
        if not is_dropped:
            kept.append(word)
    return kept


def _take(words: list[str], flag: str) -> bool:
    """Whether a flag is given, which as everywhere may be followed by true or false; it is gone from the words then."""
    given = False
    while flag in words:
        first = words.index(flag)
        value = words[first + 1 : first + 2]
        given = value != ["false"]
        del words[first : first + (2 if value in (["true"], ["false"]) else 1)]
    return given


def _dispatch(words: list[str], *, as_json: bool) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: {_USAGE}\n\n{_DESCRIPTION}\nWith every command: --json prints the result as JSON, --debug shows "
              "the traceback of an error.")  # fmt: skip
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("moe_evo"))
        return 0
    if words[0] not in _COMMANDS:
        is_option = words[0].startswith("-")
        got = f"option {words[0]!r} before any command" if is_option else f"command {words[0]!r}"
        near = get_close_matches(words[0], ["--help", "--version"] if is_option else _COMMANDS, n=1)
        advice = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown {got}, expected one of: {', '.join(_COMMANDS)}{advice}")
    from moe_evo.parsers import PARSERS

    parser = PARSERS[words[0]]()
    if "-h" in words or "--help" in words:
        parser.print_help()
        return 0
    _COMMANDS[words[0]](parser, words[1:], as_json=as_json)
    return 0


def _fail(message: str, code: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"moe-evo: {message}", file=sys.stderr)
    return code

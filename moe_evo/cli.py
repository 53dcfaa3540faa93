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
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
  moe-evo wandb-replay RUN                    write a run of W&B from the journal of a search
"""


def _search_parser() -> ArgumentParser:
    from moe_evo.config import RunConfig
    from moe_evo.config_file import config_parser

    parser = config_parser(
        "search",
        "Search which experts to keep and merge. The same command again goes on where it stood.",
        "moe-evo search [CONFIG.yaml] [--section.key VALUE ...] | --resume RUN",
        RunConfig,
    )
    parser.add_argument("--resume", metavar="RUN", type=str | None, help="go on with the run in this folder")
    return parser


def _sweep_parser() -> ArgumentParser:
    from moe_evo.config import SweepConfig
    from moe_evo.config_file import config_parser

    parser = config_parser(
        "sweep",
        "Search for every combination of numbers of experts, seeds, algorithms and tasks, on gangs that all searches "
        "share. The same command again makes the runs that are missing.",
        "moe-evo sweep [CONFIG.yaml] --sweep.num_kept 2,4,6 --sweep.seeds 0,1,2 [--section.key VALUE ...] [--no-tune]",
        SweepConfig,
    )
    parser.add_argument(
        "--no-tune",
        action="store_true",
        help="one run after the other in this process, without Ray Tune (and without Ray, if cluster.address is unset)",
    )
    return parser


def _plan_parser() -> ArgumentParser:
    from moe_evo.config import RunConfig
    from moe_evo.config_file import config_parser

    parser = config_parser(
        "plan",
        "Tell what a search would take, without loading weights: the model's size, memory of each rank for each way "
        "of sharding, gangs that fit the cluster, and everything that is wrong with the config.",
        "moe-evo plan [CONFIG.yaml] [--section.key VALUE ...] [--calibrate]",
        RunConfig,
    )
    parser.add_argument(
        "--memory_gib",
        type=float | None,
        help="memory of one rank's device; default: what is free here, and unknown for a cluster",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="load the model once and time a few evaluations, so that the time of the whole search can be told",
    )
    return parser


def _evaluate_parser() -> ArgumentParser:
    from moe_evo.config import ScoringConfig
    from moe_evo.config_file import config_parser

    parser = config_parser(
        "evaluate",
        "Score one genome on one split, with the model and tasks of a config or of a run; of a run it is the "
        "winner unless --genome says otherwise.",
        "moe-evo evaluate [RUN | CONFIG.yaml] [--genome GENOME] [--split SPLIT] [--section.key VALUE ...]",
        ScoringConfig,
    )
    parser.add_argument(
        "--genome",
        type=str | None,
        help="a .safetensors genome, an EEP .pth file, a run's folder (its best), a kept-list such as "
        "'[[0,3],[1,2]]' or a JSON file of one, or 'full' for the whole model; default: the run's best, or 'full'",
    )
    parser.add_argument("--top_k", type=int | None, help="experts active a token, in place of the genome's own")
    splits = ("search", "validation", "test")
    parser.add_argument("--split", choices=splits, default="validation", help="which examples")
    return parser


def _show_parser() -> ArgumentParser:
    from moe_evo.config_file import plain_parser

    parser = plain_parser("show", "Table, kept experts and files of a run.")
    parser.add_argument("run", type=str, help="folder of a run, finished or not")
    return parser


def _compare_parser() -> ArgumentParser:
    from moe_evo.config_file import plain_parser

    parser = plain_parser(
        "compare",
        "The final tables of several runs as one: by tasks and model, then few experts first, then the best test "
        "score first. Unfinished runs stand there with what they have.",
    )
    parser.add_argument("runs", type=str, nargs="+", metavar="RUN", help="folders of runs, finished or not")
    parser.add_argument(
        "--format", choices=("table", "csv", "json"), default="table", help="for people, or for other programs"
    )
    return parser


def _report_parser() -> ArgumentParser:
    from moe_evo.config_file import plain_parser

    parser = plain_parser(
        "report",
        "Write one HTML page over runs that needs no network: search curves, kept experts, lineage, scores by task, "
        "score against size, any two runs side by side, failures, and the commands to reproduce and export.",
    )
    parser.add_argument("runs", type=str, nargs="+", metavar="RUN", help="folders of runs, finished or not")
    parser.add_argument(
        "--to",
        type=str | None,
        metavar="FILE",
        help="file to write; default: report.html in the folder of a single run",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE even if it is no older report")
    return parser


def _export_parser() -> ArgumentParser:
    from moe_evo.config_file import plain_parser

    parser = plain_parser(
        "export",
        "Write the smaller checkpoint of a finished run, then reload it with stock transformers and compare its "
        "logits with what was evaluated.",
    )
    parser.add_argument("run", type=str, help="folder of a finished run")
    parser.add_argument("--to", type=str, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--which", choices=("best", "best_pruning"), default="best", help="the winner, or the best that only prunes"
    )
    parser.add_argument("--device", type=str, default="cpu", help="where to load the model; it needs room for both")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it is an older export")
    return parser


def _wandb_replay_parser() -> ArgumentParser:
    from moe_evo.config import TrackingConfig
    from moe_evo.config_file import plain_parser

    parser = plain_parser(
        "wandb-replay",
        "Write a new run of Weights & Biases from the journal of a search, finished or not; a search that goes on "
        "later goes on in that one.",
    )
    parser.add_argument("run", type=str, help="folder of a run that no process is working on")
    parser.add_class_arguments(TrackingConfig, "tracking")
    return parser


def _search(argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo import commands
    from moe_evo.config import RunConfig
    from moe_evo.config_file import parse_config
    from moe_evo.tracking.terminal import TerminalTracker

    arguments, config = parse_config(_search_parser(), argv, RunConfig)
    if arguments.resume is not None:
        if len(argv) > 2 or sum(word.startswith("-") for word in argv) > 1:
            raise ConfigError("--resume: got other options beside it, expected none: a run keeps its config")
        config = commands.resumed_config(arguments.resume)
    with TerminalTracker() as tracker:
        folder = commands.search(config, tracker)
    _print_run(str(folder.path), as_json=as_json)


def _sweep(argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.config import SweepConfig
    from moe_evo.config_file import parse_config
    from moe_evo.sweep import sweep
    from moe_evo.tracking.terminal import TerminalTracker

    arguments, config = parse_config(_sweep_parser(), argv, SweepConfig)
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


def _plan(argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.config import RunConfig
    from moe_evo.config_file import parse_config
    from moe_evo.plan import planned, require_no_problems
    from moe_evo.tracking.terminal import TerminalTracker

    arguments, config = parse_config(_plan_parser(), argv, RunConfig)
    with TerminalTracker() as tracker:
        answer = planned(config, arguments.memory_gib, calibrate=arguments.calibrate, tracker=tracker)
    if as_json:
        print(json.dumps(answer))
    else:
        from moe_evo.report.plan import print_plan

        print_plan(answer, shlex.join(["moe-evo", "search", *_without(argv, "--memory_gib", "--calibrate")]))
    require_no_problems(answer)


def _show(argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.config_file import parse

    _print_run(parse(_show_parser(), argv).run, as_json=as_json)


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


def _evaluate(argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo import commands
    from moe_evo.config import ScoringConfig
    from moe_evo.config_file import parse_config
    from moe_evo.tracking.terminal import TerminalTracker

    names = (word for word in argv if not word.lstrip().startswith(("[", "{", "-")) and len(word) < 256)
    run = next((name for name in names if (Path(name) / "config.yaml").is_file()), None)
    has_config = (argv[:1] and not argv[0].startswith("-")) or any(word.startswith("--config") for word in argv)
    # a run's genome without a config is scored with the run's own model and tasks
    words = list(argv) if has_config or run is None else [run, *argv]
    arguments, config = parse_config(_evaluate_parser(), words, ScoringConfig)
    genome = arguments.genome or run or "full"
    with TerminalTracker() as tracker:
        scores = commands.evaluate(config, genome, arguments.split, arguments.top_k, run, tracker)
    if as_json:
        print(json.dumps(scores))
    else:
        from moe_evo.report.terminal import print_scores

        print_scores(scores)


def _compare(argv: Sequence[str], *, as_json: bool) -> None:
    from dataclasses import asdict

    from moe_evo.config_file import parse
    from moe_evo.report.lines import as_csv, print_lines
    from moe_evo.reporting import compare

    arguments = parse(_compare_parser(), argv)
    lines = compare(arguments.runs)
    if as_json or arguments.format == "json":
        print(json.dumps([asdict(line) for line in lines]))
    elif arguments.format == "csv":
        sys.stdout.write(as_csv(lines))
    else:
        print_lines(lines)


def _report(argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo.config_file import parse
    from moe_evo.reporting import write_report

    arguments = parse(_report_parser(), argv)
    written = write_report(arguments.runs, arguments.to, overwrite=arguments.overwrite)
    if as_json:
        print(json.dumps(written))
    else:
        from moe_evo.report.terminal import print_report

        print_report(written)


def _export(argv: Sequence[str], *, as_json: bool) -> None:
    from moe_evo import commands
    from moe_evo.config_file import parse
    from moe_evo.run_folder import RunFolder
    from moe_evo.tracking.terminal import TerminalTracker

    arguments = parse(_export_parser(), argv)
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


def _wandb_replay(argv: Sequence[str], *, as_json: bool) -> None:
    from dataclasses import asdict, replace

    from moe_evo.config_file import parse, read_config
    from moe_evo.run_folder import RunFolder
    from moe_evo.tracking.start import replay

    folder = RunFolder.existing(parse(_wandb_replay_parser(), argv).run)
    config = read_config(folder.config)
    parser = _wandb_replay_parser()
    parser.set_defaults({f"tracking.{key}": value for key, value in asdict(config.tracking).items()})
    report = replay(folder, replace(config, tracking=parse(parser, argv).tracking))
    if as_json:
        print(json.dumps(report))
    else:
        old = f"; the older run {report['replaced_id']} is left as it is" if report["replaced_id"] else ""
        print(f"{report['outcomes']} outcomes in the W&B run {report['id']} ({report['mode']}){old}\n{report['where']}")


_COMMANDS: dict[str, tuple[Callable[..., None], Callable[[], Any]]] = {
    "search": (_search, _search_parser),
    "sweep": (_sweep, _sweep_parser),
    "plan": (_plan, _plan_parser),
    "evaluate": (_evaluate, _evaluate_parser),
    "show": (_show, _show_parser),
    "compare": (_compare, _compare_parser),
    "report": (_report, _report_parser),
    "export": (_export, _export_parser),
    "wandb-replay": (_wandb_replay, _wandb_replay_parser),
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
        kept = "; all finished evaluations are kept, the same command goes on" if words[:1] == ["search"] else ""
        return _fail(f"interrupted{kept}", 130, debug=debug)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what is still buffered must not raise at exit
        return 0
    except Exception as error:  # noqa: BLE001 - the border of the process: a defect still ends in one line
        message = f"unexpected {type(error).__name__}: {error}; run again with --debug for the traceback"
        return _fail(message, 1, debug=debug)


def _without(words: Sequence[str], option: str, flag: str) -> list[str]:
    """Words without an option and its value, and without a flag."""
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and word != flag and word != option and not word.startswith(f"{option}="):
            kept.append(word)
        skip = word == option
    return kept


def _take(words: list[str], flag: str) -> bool:
    found = flag in words
    words[:] = [word for word in words if word != flag]
    return found


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
        raise ConfigError(f"unknown command {words[0]!r}, expected one of: {', '.join(_COMMANDS)}")
    run, parser = _COMMANDS[words[0]]
    if "-h" in words or "--help" in words:
        parser().print_help()
        return 0
    run(words[1:], as_json=as_json)
    return 0


def _fail(message: str, code: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"moe-evo: {message}", file=sys.stderr)
    return code

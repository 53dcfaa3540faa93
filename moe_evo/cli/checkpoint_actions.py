"""The actions of the commands that write a checkpoint: export, prune, recover, compress."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_evo.cli.starting import start, tell_imports
from moe_evo.errors import ConfigError
from moe_evo.plain import plain

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from moe_evo.config.parser import CommandParser
    from moe_evo.config.recover import RecoveryConfig
    from moe_evo.config.run import ScoringConfig
    from moe_evo.report.answers import RecoveredModel


def print_recovered(recovered: RecoveredModel) -> None:
    """Print what a recovery gained, and where its checkpoint is."""
    from moe_evo.report.terminal import print_export, print_recovery

    print_recovery(recovered)
    print_export(recovered)


def export_action(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    """A run's winner as a checkpoint."""
    from moe_evo.commands.export import export
    from moe_evo.config.file import parse
    from moe_evo.records.folder import RunFolder
    from moe_evo.tracking.terminal import TerminalTracker

    arguments = parse(parser, argv)
    folder = RunFolder.existing(arguments.run)
    tell_imports()
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


def prune_action(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    """A smaller model without a search."""
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
    start(config)
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
            print_recovered(recovered)


def _recovery_of_pruned(config: ScoringConfig, arguments: Namespace) -> tuple[RecoveryConfig, Path] | None:
    """How a pruned model is to learn, and where its checkpoint goes; None without --recover."""
    if not arguments.and_recover:
        return None
    from moe_evo.commands.recovery_input import of_pruned

    return of_pruned(config, arguments.recover, Path(arguments.to), overwrite=arguments.overwrite)


def recover_action(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    """A pruned model that learned from the full one."""
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
    start(config)
    with TerminalTracker() as tracker:
        recovered = recover(
            config, arguments.pruned, Path(arguments.to), arguments.which, overwrite=arguments.overwrite,
            tracker=tracker,
        )  # fmt: skip
    if as_json:
        print(json.dumps(plain(recovered)))
    else:
        print_recovered(recovered)


def compress_action(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    """Experts made sparse or of low rank."""
    from moe_evo.commands.compress import CompressOptions, compress
    from moe_evo.report.terminal import print_compression

    _made_of_one(
        parser, argv, "checkpoint", "CHECKPOINT", CompressOptions, compress, print_compression, as_json=as_json
    )


def carve_action(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    """A dense model made an MoE."""
    from moe_evo.commands.carve import CarveOptions, carve
    from moe_evo.report.terminal import print_carving

    _made_of_one(parser, argv, "dense", "MODEL", CarveOptions, carve, print_carving, as_json=as_json)


def _made_of_one(
    parser: CommandParser,
    argv: Sequence[str],
    argument: str,
    shown: str,
    options_type: type[Any],
    command: Callable[..., Any],
    show: Callable[[Any], None],
    *,
    as_json: bool,
) -> None:
    """Run a command that makes a checkpoint of the model that its first bare word, `argument`, names.

    shown: the name of that argument in messages.
    """
    from dataclasses import fields, replace

    from moe_evo.config.file import parse_config
    from moe_evo.config.run import ScoringConfig
    from moe_evo.report.terminal import print_export
    from moe_evo.tracking.terminal import TerminalTracker

    if any(word.split("=")[0] == "--model.path" for word in argv):
        raise ConfigError(f"--model.path: got it beside {shown}, which is the model; expected one of them")
    # the model goes behind the second bare word, which may be a config
    words = [*argv[1:], argv[0]] if argv and not argv[0].startswith("-") else argv
    arguments, config = parse_config(parser, words, ScoringConfig)
    options = options_type(**{one.name: getattr(arguments, one.name) for one in fields(options_type)})
    config = replace(config, model=replace(config.model, path=getattr(arguments, argument)))
    start(config)
    with TerminalTracker() as tracker:
        report = command(config, options, Path(arguments.to), overwrite=arguments.overwrite, tracker=tracker)
    if as_json:
        print(json.dumps(plain(report)))
    else:
        show(report)
        print_export(report)

"""The command `moe-evo tasks`: its options, and its actions."""

from __future__ import annotations

import json
from collections.abc import Sequence

from moe_evo.cli.starting import start
from moe_evo.config.check import require
from moe_evo.config.file import config_parser, parse_config
from moe_evo.config.parser import CommandParser
from moe_evo.config.run import ScoringConfig
from moe_evo.plain import plain

_ACTIONS = ("check", "preview")


def tasks_parser() -> CommandParser:
    """The options of `moe-evo tasks`."""
    parser = config_parser(
        "tasks",
        "Look at a config's tasks before a search. 'check' needs no model: it tells how many examples each split has, "
        "how many stand there twice, what is right how often, and which gain so many can tell from chance. 'preview' "
        "prints three examples of each task as the model reads them, with their tokens and where scoring starts; with "
        "--answers also what the full model answers.",
        "moe-evo tasks check|preview [CONFIG.yaml] [--answers] [--section.key VALUE ...]",
        ScoringConfig,
    )
    parser.add_argument("action", type=str, metavar="|".join(_ACTIONS), help="what to do")
    parser.add_argument(
        "--answers", type=bool, default=False, help="preview: load the model, and show its answers with their scores"
    )
    return parser


def tasks_action(parser: CommandParser, argv: Sequence[str], *, as_json: bool) -> None:
    """Look at tasks; the first word says how, and the second one may be a config."""
    action = argv[0] if argv else ""
    require(action in _ACTIONS, "tasks", action, f"{' or '.join(_ACTIONS)} behind it, then the config")
    arguments, config = parse_config(parser, [*argv[1:], action], ScoringConfig)
    if action == "check":
        _check(config, as_json=as_json)
    else:
        _preview(config, answers=arguments.answers, as_json=as_json)


def _check(config: ScoringConfig, *, as_json: bool) -> None:
    from moe_evo.commands.tasks import check
    from moe_evo.report.task_check import print_check_of_tasks

    found = check(config)
    if as_json:
        print(json.dumps(plain(found)))
    else:
        print_check_of_tasks(found)


def _preview(config: ScoringConfig, *, answers: bool, as_json: bool) -> None:
    from moe_evo.commands.tasks import preview
    from moe_evo.report.task_preview import print_previews
    from moe_evo.tracking.terminal import TerminalTracker

    start(config)
    with TerminalTracker() as tracker:
        found = preview(config, tracker, answers=answers)
    if as_json:
        print(json.dumps(plain(found)))
    else:
        print_previews(found)

"""Makes a checked config of YAML files and flags; an error in them becomes a ConfigError of one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import Namespace

from moe_evo.config.check import require_path
from moe_evo.config.parser import CommandParser, Word, yaml_of
from moe_evo.config.recover import RecoveryConfig
from moe_evo.config.run import RunConfig, ScoringConfig
from moe_evo.config.sweep import SweepConfig
from moe_evo.errors import ConfigError

Config = TypeVar("Config", bound=ScoringConfig)

_LISTS = (
    "sweep.num_kept", "sweep.seeds", "sweep.algorithms", "sweep.tasks", "search.init", "search.objectives",
    "selection.baselines", "recover.methods", "recover.train",
)  # fmt: skip
"""Options whose value is a list: a single value means a list of one, and a flag takes values separated by commas."""

_COMMON = (
    " Of options that take true or false, the name alone means true. With every command: --json prints the result as "
    "JSON, --debug shows the traceback of an error."
)


def plain_parser(command: str, description: str, usage: str | None = None) -> CommandParser:
    """A parser of one command."""
    return CommandParser(prog=f"moe-evo {command}", usage=usage, description=description + _COMMON)


def config_parser(command: str, description: str, usage: str, config: type[ScoringConfig]) -> CommandParser:
    """A parser with --config and one flag for every key of `config`."""
    parser = plain_parser(command, description, usage)
    parser.add_config()
    parser.add_section(config)
    return parser


def parse(parser: CommandParser, argv: Sequence[str]) -> Namespace:
    """Parse the command line and construct the options' values; raises ConfigError with a message of one line."""
    return parser.parse(parser.words(argv))


def parse_config(
    parser: CommandParser, argv: Sequence[str], config: type[Config], note: Callable[[str], None] = lambda line: None
) -> tuple[Namespace, Config]:
    """All arguments, and the config that they make.

    Before the parser is called, files are read and short forms of tasks are replaced by dicts. Sections of a file
    that `config` does not have, but a whole run has, are dropped. note: called with a line where a search drops the
    section `sweep`.
    """
    words = parser.words(argv)
    if words and words[0].option is None and not str(words[0]).startswith("-"):
        words[0] = Word("config", words[0].value)
    files = [word.value for word in words if word.option == "config" and word.value is not None]
    words = [_spelt_out_word(word, config, note, parser.options) for word in words]
    try:
        arguments = parser.parse(words)
    except ConfigError as error:
        raise ConfigError(f"{error} (config {', '.join(files)})" if files else str(error)) from error
    return arguments, config(**{one.name: getattr(arguments, one.name) for one in fields(config)})


def _spelt_out_word(
    word: Word, config: type[ScoringConfig], note: Callable[[str], None], known: frozenset[str]
) -> Word:
    """A word in the form that the parser takes: content for a file's name, lists for single values, dicts for tasks."""
    if word.option is None or word.value is None:
        return word
    if word.option == "config":
        require_path("--config", word.value)
        return replace(word, value=yaml.safe_dump(_read(Path(word.value), config, note, known)))
    if word.option in _LISTS and not word.value.lstrip().startswith(("[", "{")):
        return replace(word, value=f"[{word.value}]")
    if word.option in ("tasks", "tasks+"):
        content = _spelt_out(yaml_of(word.value, f"--{word.option}"), one_is_list=True)
        return replace(word, value=yaml.safe_dump(content))
    return word


def read_config(path: Path) -> RunConfig:
    """The config in a YAML file; raises ConfigError."""
    return parse_config(config_parser("search", "", "", RunConfig), ["--config", str(path)], RunConfig)[1]


def _read(
    path: Path, config: type[ScoringConfig], note: Callable[[str], None], known: frozenset[str]
) -> dict[str, Any]:
    """The sections of a YAML file, or of the config in a run's folder, that the command has. known: its options."""
    file = path / "config.yaml" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise ConfigError(
            f"{path}: has no config.yaml; give a YAML file or a run's folder (a checkpoint is given as --model.path)"
        )
    try:
        text = file.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from error
    content = yaml_of(text, str(file))
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: got {type(content).__name__}, expected sections such as model and tasks")
    if config is RunConfig and content.get("sweep"):
        note(f"{file}: has a sweep: section; `moe-evo sweep {file}` runs it, this command takes the one search")
    foreign = {one.name for kind in (SweepConfig, RecoveryConfig) for one in fields(kind)}
    kept = {key: value for key, value in content.items() if key not in foreign - known}
    if "tasks" in kept:
        kept["tasks"] = _spelt_out(kept["tasks"], one_is_list=True)
    for section, option in (name.split(".") for name in _LISTS):
        part = kept.get(section)
        if isinstance(part, dict) and isinstance(part.get(option), str | int):
            kept[section] = {**part, option: [part[option]]}
    return kept


def _spelt_out(tasks: Any, *, one_is_list: bool = False) -> Any:
    """Tasks as dicts: a bare string is a task's data; with `one_is_list`, a single task becomes a list of one."""
    if isinstance(tasks, list):
        return [_spelt_out(task) for task in tasks]
    task = {"data": tasks} if isinstance(tasks, str) else tasks
    return [task] if one_is_list else task

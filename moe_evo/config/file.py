"""From YAML files and flags to a checked config; whatever is wrong with them becomes one line."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace

from moe_evo.config.run import RunConfig, ScoringConfig
from moe_evo.config.sweep import SweepConfig
from moe_evo.config.task import TaskConfig
from moe_evo.errors import ConfigError

Config = TypeVar("Config", bound=ScoringConfig)

_LISTS = (
    "sweep.num_kept", "sweep.seeds", "sweep.algorithms", "sweep.tasks", "search.init", "selection.baselines",
)  # fmt: skip
"""Options for which a single value means a list of one; as flags they take values with commas between them."""

_RENAMED = {
    "selection.frequency": "older versions had it; the baselines now stand in selection.baselines, as in [frequency]",
}
"""Options that older versions had, and what to do about them."""

_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "NoneType": "null",
    "list": "a list",
    "list[int]": "a list of whole numbers",
    "list[float]": "a list of numbers",
    "list[str]": "a list of names",
    "dict": "names with values, as in '{NAME: VALUE}'",
    "dict[str, float]": "names with numbers, as in '{NAME: 2}'",
}
_KEYS = [one.name for one in fields(TaskConfig)]

_COMMON = (
    " Of options that take true or false, the name alone means true. With every command: --json prints the result as "
    "JSON, --debug shows the traceback of an error."
)


def plain_parser(command: str, description: str, usage: str | None = None) -> ArgumentParser:
    """A parser of one command."""
    return ArgumentParser(
        prog=f"moe-evo {command}",
        usage=usage,
        description=description + _COMMON,
        exit_on_error=False,
        allow_abbrev=False,
    )


def config_parser(command: str, description: str, usage: str, config: type[ScoringConfig]) -> ArgumentParser:
    """A parser with --config and one flag for every key of `config`."""
    parser = plain_parser(command, description, usage)
    parser.add_argument(
        "--config", action="config", help="YAML file, or a run's folder; may also be given first, without --config"
    )
    parser.add_class_arguments(config, None, as_group=False)
    return parser


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse and instantiate; raises ConfigError in one line."""
    try:
        parsed: Namespace = parser.instantiate(parser.parse_args(_with_values(parser, argv)))
    except (ArgumentError, ValueError) as error:
        raise ConfigError(_reason(error, parser)) from error
    return parsed


def _with_values(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The words, with 'true' after every name that stands alone of an option that takes true or false."""
    options = parser._option_string_actions
    has_words = any(not action.option_strings for action in parser._actions)
    spelt_out = []
    for word, following in pairwise([*argv, "-"]):
        spelt_out.append(word)
        if word in options and getattr(options[word], "_typehint", None) in (bool, bool | None):
            # a word after it is its value, or where the command takes words, one of those
            is_value = following.lower() in ("true", "false") if has_words else not following.startswith("-")
            spelt_out += [] if is_value else ["true"]
    return spelt_out


def parse_config(parser: ArgumentParser, argv: Sequence[str], config: type[Config]) -> tuple[Namespace, Config]:
    """All arguments, and the config among them.

    Files are read and tasks are spelt out here, before the parser sees them; sections that only a
    whole run has are dropped where `config` does not know them.
    """
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if words and not words[0].startswith("-"):
        words.insert(0, "--config")
    files = []
    for index, (flag, value) in enumerate(pairwise(list(words))):
        if flag == "--config":
            files.append(value)
            words[index + 1] = yaml.safe_dump(_read(Path(value), config))
        elif flag.removeprefix("--") in _LISTS and not value.lstrip().startswith(("[", "{")):
            words[index + 1] = f"[{value}]"
        elif flag in ("--tasks", "--tasks+"):
            words[index + 1] = yaml.safe_dump(_spelt_out(_yaml(value, flag), one_is_list=True))
    try:
        arguments = parse(parser, words)
    except ConfigError as error:
        raise ConfigError(f"{error} (config {', '.join(files)})" if files else str(error)) from error
    return arguments, config(**{one.name: getattr(arguments, one.name) for one in fields(config)})


def read_config(path: Path) -> RunConfig:
    """The config in a YAML file; raises ConfigError."""
    return parse_config(config_parser("search", "", "", RunConfig), ["--config", str(path)], RunConfig)[1]


def _read(path: Path, config: type[ScoringConfig]) -> dict[str, Any]:
    """What of a YAML file, or of a run's folder, `config` knows."""
    file = path / "config.yaml" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise ConfigError(
            f"{path}: has no config.yaml; give a YAML file or a run's folder (a checkpoint is given as --model.path)"
        )
    try:
        text = file.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from error
    content = _yaml(text, str(file))
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: got {type(content).__name__}, expected sections such as model and tasks")
    if config is RunConfig and content.get("sweep"):
        note = f"{file}: has a sweep: section; `moe-evo sweep {file}` runs it, this command takes the one search"
        print(f"moe-evo: note: {note}", file=sys.stderr)
    foreign = {one.name for one in fields(SweepConfig)} - {one.name for one in fields(config)}
    kept = {key: value for key, value in content.items() if key not in foreign}
    if "tasks" in kept:
        kept["tasks"] = _spelt_out(kept["tasks"], one_is_list=True)
    for section, option in (name.split(".") for name in _LISTS):
        part = kept.get(section)
        if isinstance(part, dict) and isinstance(part.get(option), str | int):
            kept[section] = {**part, option: [part[option]]}
    return kept


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: is not YAML ({' '.join(str(error).split())})") from error


def _spelt_out(tasks: Any, *, one_is_list: bool = False) -> Any:
    """A bare string among tasks means its data; a single task means a list of one."""
    if isinstance(tasks, list):
        return [_spelt_out(task) for task in tasks]
    task = {"data": tasks} if isinstance(tasks, str) else tasks
    return [task] if one_is_list else task


def _reason(error: BaseException, parser: ArgumentParser) -> str:
    """The complaint of a config section where there is one, else the parser's, in one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    complaint = " ".join(str(error).split())
    return _unknown(complaint, parser) or _readable(complaint)


def _unknown(complaint: str, parser: ArgumentParser) -> str | None:
    """What to do about an option that does not exist, where that is the complaint."""
    if flag := re.match(r"unrecognized arguments: (--[^\s=]+)", complaint):
        dashes, name = "--", flag[1].removeprefix("--")
    elif word := re.match(r"unrecognized arguments: (.*)", complaint):
        return f"got {word[1]!r}, which belongs to no option; --help tells what each takes"
    elif key := re.match(r"Group '([\w.]+)' does not accept option '([^']+)'", complaint):
        dashes, name = "", f"{key[1]}.{key[2]}"
    elif key := re.match(r"Option '([^']+)' is not accepted", complaint):
        dashes, name = "", key[1]
    else:
        return None
    if name in _RENAMED:
        return f"{dashes}{name}: {_RENAMED[name]}"
    names = [one.removeprefix("--") for one in parser._option_string_actions if one.startswith("--")]
    sections = {one.rpartition(".")[0] for one in names}
    near = _nearest(name, [one for one in names if one not in sections and not one.endswith("+")])
    advice = f"did you mean {dashes}{near}?" if near else "--help lists all options"
    return f"{dashes}{name}: no such option; {advice}"


def _nearest(name: str, names: Sequence[str]) -> str | None:
    """The name that is probably meant: one that ends like this, else one that is spelt like it, or whose end is."""
    ends = {one.rpartition(".")[2]: one for one in reversed(names)}
    end = name.rpartition(".")[2]
    if "." not in name and end in ends:
        return ends[end]
    if whole := get_close_matches(name, names, n=1):
        return whole[0]
    return next((ends[one] for one in get_close_matches(end, ends, n=1)), None)


def _readable(complaint: str) -> str:
    """A parser's complaint in the words of our own: the option, what was got, what was expected."""
    key = re.match(r'Parser key "([\w.]+)": (.*)', complaint)
    if key is None:
        return complaint
    option, rest = key.groups()
    if unknown := re.search(r"Option '(\w+)' is not accepted", rest):
        near = get_close_matches(unknown[1], _KEYS, n=1)
        return f"{option}: got an unknown key {unknown[1]!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    if nested := re.search(r"NestedArg\(key='(.*)', val='(.*)'\)", rest):  # --option.KEY VALUE
        return f"{option}.{nested[1]}: got {nested[2]!r}, expected {_types(rest.split('Got value')[0])}"
    got = re.search(r".*(?:Got|Given) value: (.*)$", rest)
    if choices := re.search(r"Literal\[([^\]]*)\]", rest):
        expected = f"one of {choices[1]}"
    else:
        subtypes = re.search(r"Subtypes: \[(.*)\] Errors:", rest)
        expected = _types(subtypes[1] if subtypes else rest.split("Given value type")[0])
    if got is None or not expected:
        return f"{option}: {rest}"
    return f"{option}: got {got[1]!r}, expected {expected}"


def _types(text: str) -> str:
    """The types that a complaint names, in words."""
    if "Errors:" in text:
        text = text.split("Errors:")[1]
    found = re.findall(r"((?:dict|list)\[[^\]]*\])|<class '(\w+)'>", text)
    names = dict.fromkeys(whole or name for whole, name in found)
    return " or ".join(_TYPES.get(one) or _TYPES.get(one.partition("[")[0], one) for one in names)

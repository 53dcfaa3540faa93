"""The parser of one command. It checks names and types of options, so that its error messages are moe_evo's own.

Whether a value makes sense is checked by the config's sections.
"""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentError
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from itertools import groupby
from typing import Any, Literal, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from moe_evo.config.check import require, require_path
from moe_evo.config.value_types import element_types, expected, fits, misfit, unknown_key
from moe_evo.errors import ConfigError
from moe_evo.files.yaml_text import YamlError, YamlRefused
from moe_evo.files.yaml_text import yaml_of as read_yaml
from moe_evo.shown import shown

_RENAMED = {
    "selection.frequency": "older versions had it; the baselines now stand in selection.baselines, as in [frequency]",
}
"""Options of older versions, and what to use instead."""


@dataclass(frozen=True)
class Word:
    """A word of the command line: an option without its dashes and its value, or a value alone."""

    option: str | None
    value: str | None

    def __str__(self) -> str:
        if self.option is None:
            return str(self.value)
        return f"--{self.option}" if self.value is None else f"--{self.option}={self.value}"


class CommandParser:
    """The parser of one command: its options, and how many bare words (arguments without an option) it takes."""

    def __init__(self, **options: Any) -> None:
        self._parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, **options)
        self._types: dict[str, Any] = {"help": Any}
        self._paths: list[str] = []
        self._bare: dict[str, Any] = {}  # arguments that take bare words, and how many
        self._required: dict[str, str] = {}  # what has to be there, with the complaint where it is not
        self._switches: dict[str, str] = {}  # sections whose name alone is an option that takes true or false
        self.print_help = self._parser.print_help
        self.set_defaults = self._parser.set_defaults

    @property
    def options(self) -> frozenset[str]:
        """The names of all options, without their dashes."""
        return frozenset(self._types)

    def add_argument(self, name: str, *, is_path: bool = False, **options: Any) -> None:
        """As `ArgumentParser.add_argument`, with one name. is_path: whether its values are paths."""
        if is_path:
            self._paths.append(name.removeprefix("--"))
        of_choices: Any = Literal
        hint = of_choices[tuple(options["choices"])] if "choices" in options else options.get("type", Any)
        if name.startswith("--"):
            self._types[name.removeprefix("--")] = hint
        else:
            self._bare[name] = options.get("nargs")
        if options.get("required") or not name.startswith("--"):
            self._required[name] = _missing_line(name, options)
        self._parser.add_argument(name, **options)

    def add_config(self) -> None:
        """Add the option --config, whose value is a file's content, and with it --print_config."""
        self._parser.add_argument(
            "--config", action="config", help="YAML file, or a run's folder; may also be given first, without --config"
        )
        self._types.update({"config": Any, "print_config": Any})

    def add_section(self, config: type, name: str | None = None) -> None:
        """Add an option for every field of a dataclass; name: of its section."""
        self._parser.add_class_arguments(config, name, as_group=name is not None)
        if name is not None:
            self._types[name] = config
        self._types.update(_types_of(config, f"{name}." if name else ""))

    def add_switch(self, section: str, argument: str) -> None:
        """Let the bare name of a section be an option that takes true or false, whose value `argument` has."""
        self._parser.add_argument(f"--{argument}", type=bool, default=False, help=SUPPRESS)
        self._types[argument] = bool
        self._switches[section] = argument

    def parse(self, words: Sequence[Word]) -> Namespace:
        """Check and parse words, and construct the options' values; raises ConfigError with a message of one line."""
        self.check(words)
        try:
            parsed: Namespace = self._parser.instantiate(self._parser.parse_args(list(map(str, words))))
        except (ArgumentError, ValueError, TypeError, OverflowError) as error:
            raise ConfigError(_reason(error)) from error
        except RecursionError as error:
            raise ConfigError("got lists in lists too deep to read, expected plain values") from error
        for name in self._paths:
            found = parsed.get(name)
            for path in found if isinstance(found, list) else [found]:
                shown_name = name if name in self._bare else f"--{name}"
                require(path != "", shown_name, path, "a path")
                require_path(shown_name, path, is_stored=False)
        return parsed

    def words(self, argv: Iterable[str]) -> list[Word]:
        """The command line as options with their values, and bare words.

        An option that takes true or false may come without a value, and is then true. The word after it is its value
        if it can be one; where the command takes bare words, only if it is true or false.
        """
        found: list[Word] = []
        rest = list(argv)
        while rest:
            name, is_joined, value = rest.pop(0).partition("=")
            if not name.startswith("--"):
                found.append(Word(None, name + is_joined + value))
                continue
            option = name.removeprefix("--")
            if option in self._switches:
                given = value if is_joined else rest[0] if rest else ""
                is_value = given.lower() in ("true", "false")
                if is_value or not given.lstrip().startswith("{"):
                    if is_value and not is_joined:
                        rest.pop(0)
                    found.append(Word(self._switches[option], given if is_value else "true"))
                    continue
            if is_joined:
                found.append(Word(option, value))
                continue
            is_bool = self._types.get(option) in (bool, bool | None)
            follows = bool(rest) and not _is_option(rest[0])
            if is_bool and self._bare:
                follows = bool(rest) and rest[0].lower() in ("true", "false")
            found.append(Word(option, rest.pop(0) if follows else "true" if is_bool else None))
        return found

    def check(self, words: Sequence[Word]) -> None:
        """Raise ConfigError for the first option that does not exist, or whose value has another type."""
        for word in words:
            if word.option is not None:
                self._check_option(word.option, word.value)
        self._check_switches(words)
        if (missing := self._missing(words)) is not None:
            raise ConfigError(self._required[missing])
        if unclaimed := self._unclaimed(words):
            raise ConfigError(f"got {' '.join(unclaimed)!r}, which belongs to no option; --help tells what each takes")

    def _check_switches(self, words: Sequence[Word]) -> None:
        """Raise ConfigError for an option of a section that is not switched on; a file may have the section."""
        for section, argument in self._switches.items():
            is_on = any(word.option == argument and word.value in ("true", "True") for word in words)
            given = (word.option for word in words if word.option is not None)
            unread = next((one for one in given if one == section or one.startswith(f"{section}.")), None)
            if unread is not None and not is_on:
                raise ConfigError(f"--{unread}: got it without --{section}, expected both; add --{section}")

    def _check_section(self, name: str, content: Any) -> None:
        """The same check for the content of a file; name: of the section, or '' for the whole file."""
        if not isinstance(content, Mapping):
            if content is not None:
                raise ConfigError(f"{name}: got {shown(str(content))}, expected {expected(dict)}")
            return
        for key, value in content.items():
            option = f"{name}.{key}" if name else str(key)
            if option not in self._types:
                raise self._unknown(option, "")
            if is_dataclass(self._types[option]):
                self._check_section(option, value)
            elif complaint := misfit(option, value, self._types[option]):
                raise ConfigError(complaint)

    def _check_option(self, option: str, value: str | None) -> None:
        name = option.removesuffix("+")
        hints = self._types_of(option)
        if value is None:
            return
        content = _yaml_or_text(value, name)
        if is_dataclass(hints[0]) or option == "config":
            self._check_section("" if option == "config" else name, content)
        elif not any(fits(one, hint) for one in (value, content) for hint in hints):
            shown = content if isinstance(content, list | dict) else value
            complaint = misfit(name, shown, hints[0])
            assert complaint is not None, (name, shown, hints)
            raise ConfigError(complaint)

    def _types_of(self, option: str) -> list[Any]:
        """The types that an option's value may have; OPTION+ appends to a list, and OPTION.KEY sets a key of a dict."""
        name = option.removesuffix("+")
        if name == option and name in self._types:
            return [self._types[name]]
        if name != option and (elements := element_types(self._types.get(name), list)):
            return [self._types[name], *elements]
        parent, _, key = name.rpartition(".")
        if parent in self._types and key == "help":  # which jsonargparse adds where a list is of dataclasses
            return [Any]
        for section in filter(is_dataclass, element_types(self._types.get(parent), list)):  # of the last one in a list
            hints = get_type_hints(section)
            if key not in hints:
                raise ConfigError(unknown_key(parent, key, hints))
            return [hints[key]]
        if values := element_types(self._types.get(parent), dict):
            return values
        raise self._unknown(option, "--")

    def _missing(self, words: Sequence[Word]) -> str | None:
        """The first required option or bare word that is not there, if any."""
        given = {f"--{word.option}" for word in words if word.option is not None}
        if "--print_config" in given:
            return None
        num_bare = sum(word.option is None for word in words)
        bare = [name for name in self._required if not name.startswith("--")]
        options = [name for name in self._required if name.startswith("--")]
        return next((one for one in [*bare[num_bare:], *options] if one not in given), None)

    def _unclaimed(self, words: Sequence[Word]) -> list[str]:
        """Bare words that the command does not take: those beyond its number, or not next to each other."""
        runs = [list(map(str, run)) for is_bare, run in groupby(words, lambda one: one.option is None) if is_bare]
        odd = [word for run in runs for word in run if _is_option(word)]
        first = len(runs[0]) if runs and "+" in self._bare.values() else len(self._bare)
        return odd or [word for run in runs for word in run][first:]

    def _unknown(self, name: str, dashes: str) -> ConfigError:
        """The error for an option that does not exist, with the nearest name."""
        if name in _RENAMED:
            return ConfigError(f"{dashes}{name}: {_RENAMED[name]}")
        near = self._nearest(name, dashes)
        advice = f"did you mean {dashes}{near}?" if near else "--help lists all options"
        return ConfigError(f"{dashes}{name}: no such option; {advice}")

    def _nearest(self, name: str, dashes: str) -> str | None:
        """The option that is probably meant: one with the same last part, else one spelt like the name or its end."""
        parent, _, end = name.rpartition(".")
        if not dashes:  # in a file, first one of the same section
            siblings = [one for one in self._types if one.rpartition(".")[0] == parent]
            if near := get_close_matches(name, siblings, n=1):
                return near[0]
        names = [one for one, hint in self._types.items() if not is_dataclass(hint)]
        ends = {one.rpartition(".")[2]: one for one in reversed(names)}
        if not parent and end in ends:
            return ends[end]
        if whole := get_close_matches(name, names, n=1):
            return whole[0]
        return next((ends[one] for one in get_close_matches(end, ends, n=1)), None)


class RefusedValue(ConfigError):
    """A value is YAML that no option may have."""


def yaml_of(text: str, where: str) -> Any:
    """The content of a YAML text; raises ConfigError."""
    try:
        return read_yaml(text)
    except YamlRefused as error:
        raise RefusedValue(f"{where}: got {error}, expected plain values") from error
    except YamlError as error:
        raise ConfigError(f"{where}: is not YAML ({error})") from error


def _yaml_or_text(text: str, option: str) -> Any:
    try:
        return yaml_of(text, option)
    except RefusedValue:
        if not text.lstrip().startswith(("[", "{", "&", "- ")):  # such as a text with !, or nan
            return text
        raise
    except ConfigError:
        return text


def _types_of(config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Names and types of all options of a config, which is a dataclass of dataclasses."""
    hints = get_type_hints(config)
    for one in fields(config):
        name, hint = f"{prefix}{one.name}", hints[one.name]
        yield name, hint
        if is_dataclass(hint):
            yield from _types_of(hint, f"{name}.")


def _missing_line(name: str, options: Mapping[str, Any]) -> str:
    """What is told where a required option or bare word is not there; options: as for `add_argument`."""
    shown = str(options.get("metavar") or name.removeprefix("--").upper())
    meaning = str(options.get("help", "")).split(";")[0].split(":")[0]
    is_option = name.startswith("--")
    return f"{name if is_option else shown}: is missing, expected {f'{name} {shown}, ' if is_option else ''}{meaning}"


def _is_option(word: str) -> bool:
    """Whether a word is an option; a negative number is not."""
    try:
        float(word)
    except ValueError:
        return word.startswith("-")
    return False


def _reason(error: BaseException) -> str:
    """The message of a config section's error if there is one, else of the parser's, in one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split())

"""From keyword arguments to a checked config.

A keyword is one of three: the last part of a flag (`num_kept=4` for `--search.num_kept 4`), a section as in YAML
(`search={"num_kept": 4}`), or a flag's whole name (`**{"search.num_kept": 4}`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from moe_evo.config.file import config_parser, parse_config
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import ScoringConfig
from moe_evo.config.task import TaskConfig
from moe_evo.errors import ConfigError
from moe_evo.plain import Plain, PlainError, field_types, value_of

Model: TypeAlias = str | Path | Mapping[str, object] | ModelConfig
"""A checkpoint's folder or Hugging Face name, or the section `model`."""

Task: TypeAlias = str | Path | Mapping[str, object] | TaskConfig
"""Data of a task, or a task with its options."""

_TASK = "a file, a folder, a name, a dict with a task's options, or a TaskConfig"

Tasks: TypeAlias = Task | Sequence[Task]

Config: TypeAlias = str | Path | Mapping[str, object] | ScoringConfig
"""A YAML file, the folder of a run, or a config as a dict or as a value."""

Kind = TypeVar("Kind", bound=ScoringConfig)


def config_of(
    kind: type[Kind], config: Config | None, model: Model | None, tasks: Tasks | None, options: Mapping[str, object]
) -> Kind:
    """The config that a call asks for: `config`, or else the defaults of `kind`, changed by the other arguments.

    options: keyword arguments. Raises ConfigError; for an unknown keyword its message gives the nearest known one.
    """
    changes: Plain = {}
    if isinstance(config, Mapping):
        changes = {str(key): _copied(part) for key, part in config.items()}
        _refuse_unknown(changes, [one.name for one in fields(kind)], "config")
        config = None
    given: dict[str, object] = dict(options)
    if model is not None:
        given["model"] = {"path": str(model)} if isinstance(model, str | Path) else model
    if tasks is not None:
        given["tasks"] = tasks
    for name, value in sorted(_spelt_out(kind, given).items(), key=lambda one: one[0].count(".")):
        _put(changes, name, value)
    try:
        if "tasks" in changes:
            changes["tasks"] = _task_list(changes["tasks"])
        changed: Kind = _changed(_base(kind, config), changes, "")
    except PlainError as error:
        raise ConfigError(str(error)) from error
    return changed


def _base(kind: type[Kind], config: str | Path | ScoringConfig | None) -> Kind:
    if config is None:
        return kind()
    if isinstance(config, ScoringConfig):
        known = {one.name for one in fields(config)}
        return kind(**{one.name: getattr(config, one.name) for one in fields(kind) if one.name in known})
    return parse_config(config_parser("search", "", "", kind), ["--config", str(config)], kind)[1]


def _spelt_out(kind: type[ScoringConfig], options: Mapping[str, object]) -> Plain:
    """Options by their whole names, such as `search.num_kept`; a section given as a dict is split into its options."""
    whole = list(_names(kind(), ""))
    ends: dict[str, list[str]] = {}
    for name in whole:
        ends.setdefault(name.rpartition(".")[2], []).append(name)
    sections = [one.name for one in fields(kind)]
    found: Plain = {}
    for keyword, value in options.items():
        names = [keyword] if keyword in sections or keyword in whole else ends.get(keyword, [])
        if not names:
            raise _unknown(keyword, [*sections, *ends])
        if len(names) > 1:
            told = ", ".join(names)
            raise ConfigError(f"{keyword}: may be one of {told}; give it with its section, as in {_as_section(names)}")
        is_section = names[0] in sections and isinstance(value, Mapping) and keyword != "tasks"
        for name, one in _leaves(value, names[0]) if is_section else [(names[0], value)]:
            if name in found:
                raise ConfigError(f"{name}: got it twice, expected it once")
            found[name] = one
    return found


def _as_section(names: Sequence[str]) -> str:
    section, _, end = names[-1].rpartition(".")
    return f"{section.partition('.')[0]}={{'{end}': ...}}"


def _names(section: object, path: str) -> Iterator[str]:
    """The whole names of all options of a config, except those of its tasks, which are given with each task."""
    for one in fields(section):  # type: ignore[arg-type]
        value, name = getattr(section, one.name), f"{path}{one.name}"
        if is_dataclass(value):
            yield from _names(value, f"{name}.")
        elif name != "tasks":
            yield name


def _leaves(value: object, name: str) -> Iterator[tuple[str, object]]:
    """The options of a section, one by one; a dict that is one option's value stays whole."""
    assert isinstance(value, Mapping)
    for key, one in value.items():
        is_inner = isinstance(one, Mapping) and f"{name}.{key}" == "search.eep"
        yield from _leaves(one, f"{name}.{key}") if is_inner else [(f"{name}.{key}", one)]


def _put(changes: Plain, name: str, value: object) -> None:
    """Put an option, given by its whole name, into the nested dict `changes`.

    Raises ConfigError where a section that contains it was given as one value.
    """
    *path, end = name.split(".")
    for depth, section in enumerate(path, start=1):
        changes = changes.setdefault(section, {})
        if not isinstance(changes, dict):
            raise ConfigError(f"{name}: got it beside a whole {'.'.join(path[:depth])}, expected one of them")
    changes[end] = value


def _changed(section: Any, changes: Mapping[str, object], where: str) -> Any:
    """A section with some options changed; its constructor checks the new values."""
    types = field_types(type(section))
    _refuse_unknown(changes, list(types), where)
    made = {}
    for key, change in changes.items():
        name, now = f"{where}{key}", getattr(section, key)
        if is_dataclass(now) and isinstance(change, Mapping):
            made[key] = _changed(now, change, f"{name}.")
        else:
            made[key] = _value(types[key], _simple(change), name)
    return replace(section, **made)


def _value(kind: object, value: object, name: str) -> object:
    """The value of an option; where a list is expected, a single value becomes a list of one."""
    option: Any = kind
    try:
        return value_of(option, value, name)
    except PlainError:
        if not isinstance(value, str | int):
            raise
        try:
            return value_of(option, [value], name)
        except PlainError:
            pass
        raise


def _copied(value: object) -> object:
    """The value with dicts of its own, at every depth."""
    return {key: _copied(one) for key, one in value.items()} if isinstance(value, Mapping) else value


def _simple(value: object) -> object:
    """The value in the types of YAML: a path as text, a NumPy number as Python's, a range or array as a list."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _simple(one) for key, one in value.items()}
    return [_simple(one) for one in value] if isinstance(value, list | tuple | range) else value


def _task_list(tasks: Any) -> list[TaskConfig]:
    """Tasks as a config has them; a single one is a list of one."""
    if isinstance(tasks, str | Path | Mapping | TaskConfig):
        tasks = [tasks]
    if not isinstance(tasks, Iterable):
        raise ConfigError(f"tasks: got {tasks!r}, expected a task or a list of tasks: {_TASK}")
    return [_task(one, number) for number, one in enumerate(tasks)]


def _task(task: Task, number: int) -> TaskConfig:
    if isinstance(task, TaskConfig):
        return task
    if not isinstance(task, str | Path | Mapping):
        raise ConfigError(f"tasks[{number}]: got {task!r}, expected {_TASK}")
    given = {"data": task} if isinstance(task, str | Path) else dict(task)
    _refuse_unknown(given, [one.name for one in fields(TaskConfig)], f"tasks[{number}].")
    return value_of(TaskConfig, _simple(given), f"tasks[{number}]")


def _refuse_unknown(given: Mapping[str, object], known: Sequence[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise _unknown(name, known, where)


def _unknown(name: str, known: Sequence[str], where: str = "") -> ConfigError:
    if not where and name in {one.name for one in fields(TaskConfig)}:
        return ConfigError(
            f"{name}: no such option; give it with its task, as in tasks=[{{'data': ..., {name!r}: ...}}]"
        )
    near = get_close_matches(name.rpartition(".")[2], known, n=1)
    advice = f"did you mean {where}{near[0]}?" if near else f"expected one of {', '.join(known)}"
    return ConfigError(f"{where}{name}: no such option; {advice}")

"""A task's data: which files, which split each example stands in, and a hash of what was read.

`check_tasks` reads and checks everything before a model is loaded; nothing here imports torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moe_evo.config.check import require_unset
from moe_evo.config.task import AUTO, DEFAULT, TaskConfig
from moe_evo.errors import ConfigError, TaskError
from moe_evo.files.json_text import JsonError, json_of
from moe_evo.shown import shown
from moe_evo.tasks.examples import Example, kind_of
from moe_evo.tasks.kinds import KINDS, SHARE

SPLITS = ("search", "validation", "test")
REPORTED = "search_reported"
"""All examples of the search split scored by `metric`, for the report of a search that saw something else."""
SCORINGS = (*SPLITS, REPORTED)
"""What a genome can be scored on: the search split by `search_metric`, the other splits by `metric`, and REPORTED."""
MIN_EXAMPLES = 2  # a standard error needs two


@dataclass(frozen=True)
class TaskData:
    """The checked examples of one task.

    kind and metrics are resolved, never 'auto' or 'default'. hash: sha256 of the bytes read.
    """

    config: TaskConfig
    name: str
    kind: str
    metric: str
    search_metric: str
    splits: Mapping[str, tuple[Example, ...]]
    few_shot: tuple[Example, ...]
    hash: str


def embedded_task_names() -> list[str]:
    """The tasks that come with this package."""
    folder = _embedded_folder()
    return sorted(one.name for one in folder.iterdir() if one.is_dir()) if folder.is_dir() else []


def task_name(config: TaskConfig) -> str:
    """The name given, or that of the data's file or folder."""
    return config.name or Path(config.data).expanduser().absolute().name.removesuffix(".jsonl")


def check_tasks(configs: Sequence[TaskConfig]) -> tuple[TaskData, ...]:
    """Read and check the data of all tasks; raises TaskError or ConfigError."""
    names = [task_name(config) for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"tasks: got the name {name!r} twice, expected distinct ones; set tasks.name")
    tasks = tuple(map(read_task, configs))
    for option in ("metric", "search_metric"):
        units = {task.name: KINDS[task.kind].unit(getattr(task, option)) for task in tasks}
        if len(set(units.values())) > 1:
            listed = ", ".join(f"{name} is {unit}" for name, unit in units.items())
            where = "" if option == "metric" else " on the search split"
            raise ConfigError(f"tasks: fitness{where} would mix units ({listed}); give a {option} of one unit")
    return tasks


def is_share(tasks: Sequence[TaskData]) -> bool:
    """Whether what is reported of these tasks is a share from 0 to 1, as accuracy is."""
    return all(KINDS[task.kind].unit(task.metric) == SHARE for task in tasks)


def reported(split: str, tasks: Sequence[TaskData], *, is_fresh: bool = False) -> str:
    """By which of `SCORINGS` a split's scores are reported: that of its own name, but for some search splits.

    They are reported by themselves where the search maximised another metric, or saw only samples of them (is_fresh).
    """
    differs = is_fresh or any(one.search_metric != one.metric for one in tasks)
    return REPORTED if split == "search" and differs else split


def read_task(config: TaskConfig) -> TaskData:
    """Read, check and split one task's data; raises TaskError or ConfigError."""
    _check_metric(config)
    files, few_shot_files = _split_files(config), _few_shot_files(config)
    kind = config.kind if config.kind != AUTO else _kind(next(iter(files.values())))
    metric, search_metric = _metrics(config, kind)
    if "" not in files:
        reason = "as there is a file for each split"
        require_unset(config, f"tasks ({task_name(config)})", ["split_shares"], reason)
    parts = {name: tuple(_examples(file, kind, [metric, search_metric])) for name, file in files.items()}
    few_shot = tuple(example for file in few_shot_files for example in _shots(file, kind))
    _check_options(config, kind, [*few_shot, *(example for part in parts.values() for example in part)])
    splits = parts if "" not in parts else _split_by_hash(parts[""], config.split_shares)
    _check_disjoint(config, splits, few_shot)
    for split in SPLITS:
        _check_size(config, splits, split)
    limited = {split: _limit(splits[split], config.num_examples(split)) for split in SPLITS}
    hashed = _hash([file.content for file in (*files.values(), *few_shot_files)])
    name = task_name(config)
    return TaskData(config, name, kind, metric, search_metric, MappingProxyType(limited), few_shot, hashed)


@dataclass(frozen=True)
class DataFile:
    """A file of examples as it was read. shown: its name for error messages."""

    shown: str
    content: bytes


def _embedded_folder() -> Traversable:
    return resources.files("moe_evo").joinpath("data", "tasks")


def _split_files(config: TaskConfig) -> dict[str, DataFile]:
    """The files by split; one file that is still to be split stands under ''."""
    where = f"task {task_name(config)}"
    # a bare name is an embedded task even where a folder of that name lies about: write ./name for that
    if config.data in embedded_task_names():
        folder: Traversable = _embedded_folder().joinpath(config.data)
    else:
        folder = Path(config.data).expanduser()
    if folder.is_file():
        return {"": read_file(folder, config.data)}
    if not folder.is_dir():
        raise TaskError(
            f"{where}: data: got {shown(config.data)}, which is no file, no folder and no embedded task; "
            f"embedded tasks are {', '.join(embedded_task_names()) or 'none'}"
        )
    missing = [f"{split}.jsonl" for split in SPLITS if not folder.joinpath(f"{split}.jsonl").is_file()]
    if missing:
        raise TaskError(
            f"{where}: data: folder {config.data!r} has no {' and no '.join(missing)}; give all of "
            "search.jsonl, validation.jsonl and test.jsonl, or one file that is split by hash"
        )
    names = {split: f"{split}.jsonl" for split in SPLITS}
    return {split: read_file(folder.joinpath(name), f"{config.data}/{name}") for split, name in names.items()}


def _few_shot_files(config: TaskConfig) -> list[DataFile]:
    if config.few_shot is None:
        return []
    path = Path(config.few_shot).expanduser()
    if not path.is_file():
        raise TaskError(f"task {task_name(config)}: few_shot: no file {shown(config.few_shot)}")
    return [read_file(path, config.few_shot)]


def read_file(file: Traversable, shown: str) -> DataFile:
    """Raises TaskError where it cannot be read."""
    try:
        return DataFile(shown, file.read_bytes())
    except OSError as error:
        raise TaskError(f"{shown}: cannot be read: {error.strerror}") from error


def json_rows(file: DataFile) -> Iterator[tuple[str, Any]]:
    """(file:line, value) of each line that is not blank."""
    for where, text in text_rows(file):
        try:
            yield where, json_of(text)
        except JsonError as error:
            raise TaskError(f"{where}: {error}; expected one object a line") from error


def text_rows(file: DataFile) -> Iterator[tuple[str, str]]:
    """(file:line, text without outer spaces) of each line that is not blank."""
    for number, line in enumerate(file.content.split(b"\n"), start=1):
        where = f"{file.shown}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise TaskError(f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
        if text:
            yield where, text


def _examples(file: DataFile, kind: str, metrics: Sequence[str]) -> Iterator[Example]:
    """The examples, each of which suits all `metrics`."""
    empty, parse = True, KINDS[kind].parse
    for where, row in json_rows(file):
        empty = False
        example, *_ = [parse(row, metric, where) for metric in dict.fromkeys(metrics)]
        yield example
    if empty:
        raise TaskError(f"{file.shown}: is empty, expected one JSON object a line")


def _shots(file: DataFile, kind: str) -> Iterator[Example]:
    """Few-shot examples: as the task's own, or, where those have no answers, any that have one."""
    shot_kind = _kind(file) if kind == "distillation" else kind
    if shot_kind == "perplexity":
        raise TaskError(f"{file.shown}: few-shot examples have texts, expected prompts with answers")
    return _examples(file, shot_kind, [DEFAULT])


def _kind(file: DataFile) -> str:
    for where, row in json_rows(file):
        if not isinstance(row, dict):
            raise TaskError(f"{where}: got {type(row).__name__}, expected a JSON object")
        return kind_of(row, where)
    raise TaskError(f"{file.shown}: is empty, expected one JSON object a line")


def _check_metric(config: TaskConfig) -> None:
    """Refuse an unknown kind, or a metric of another one, before any file is read."""
    if config.kind != AUTO:
        KINDS.get(config.kind, f"tasks ({task_name(config)}).kind", also=[AUTO])
        _metrics(config, config.kind)


def _metrics(config: TaskConfig, kind: str) -> tuple[str, str]:
    """What is reported, and what a search maximises; raises ConfigError."""

    def named(name: str, option: str, default: str) -> str:
        where = f"tasks ({task_name(config)}).{option}"
        return default if name == DEFAULT else KINDS[kind].metric(name, where, kind)

    metric = named(config.metric, "metric", next(iter(KINDS[kind].metrics)))
    return metric, named(config.search_metric, "search_metric", metric)


def _check_options(config: TaskConfig, kind: str, examples: Sequence[Example]) -> None:
    """Refuse options of the prompt where there are texts and no prompts."""
    for option in ("prefix", "few_shot", "chat_template"):
        if getattr(config, option) and any(example.text for example in examples):
            raise ConfigError(
                f"tasks ({task_name(config)}).{option}: got {getattr(config, option)!r}, expected none, as the "
                f"task's examples are texts without prompts (kind {kind})"
            )


def _split_by_hash(examples: Sequence[Example], shares: tuple[float, float, float]) -> dict[str, tuple[Example, ...]]:
    """The same prompt always lands in the same split, in any file and on any machine."""
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for example in examples:
        position = int(example.digest[:13], 16) / 16**13
        search_end, validation_end = shares[0], shares[0] + shares[1]
        split = "search" if position < search_end else "validation" if position < validation_end else "test"
        splits[split].append(example)
    return {split: tuple(part) for split, part in splits.items()}


def _check_disjoint(config: TaskConfig, splits: Mapping[str, Sequence[Example]], few_shot: Sequence[Example]) -> None:
    """No input stands in two splits, or both in a split and among the few-shot examples."""
    seen: dict[tuple[str, tuple[str, ...]], tuple[str, str]] = {}
    for split, examples in (("few_shot", few_shot), *splits.items()):
        for example in examples:
            other, where = seen.setdefault(example.key, (split, example.where))
            if other != split:
                raise TaskError(
                    f"task {task_name(config)}: {example.where} ({split}) repeats the input of {where} "
                    f"({other}); expected each input in one of them only; remove one of the two lines"
                )


def _check_size(config: TaskConfig, splits: Mapping[str, Sequence[Example]], split: str) -> None:
    got, limit = len(splits[split]), config.num_examples(split)
    sizes = ", ".join(f"{name} {len(splits[name])}" for name in SPLITS)
    if got < MIN_EXAMPLES and (repeated := _repeated(splits)):
        raise TaskError(f"task {task_name(config)}: split {split} has {got} examples ({sizes}): {repeated}")
    if got < MIN_EXAMPLES:
        raise TaskError(
            f"task {task_name(config)}: split {split} has {got} examples ({sizes}), expected at least "
            f"{MIN_EXAMPLES}; give more examples or other split_shares"
        )
    if 0 < limit < MIN_EXAMPLES:
        raise TaskError(
            f"task {task_name(config)}: num_{split}: got {limit}, expected at least {MIN_EXAMPLES} or 0 for all"
        )


def _repeated(splits: Mapping[str, Sequence[Example]]) -> str:
    """In words, where examples have so few different prompts that not every split can get some; else ''."""
    digests = {example.digest for part in splits.values() for example in part}
    number = sum(map(len, splits.values()))
    if len(digests) == number or len(digests) >= len(SPLITS) * MIN_EXAMPLES:
        return ""
    different = "the same prompt" if len(digests) == 1 else f"only {len(digests)} different prompts"
    return (
        f"all {number} examples have {different}, and equal prompts always go into one split; give different prompts, "
        "or a folder with search.jsonl, validation.jsonl and test.jsonl"
    )


def _limit(examples: tuple[Example, ...], limit: int) -> tuple[Example, ...]:
    """The `limit` examples of smallest hash, in the file's order: a fair sample even of a sorted file."""
    if limit == 0 or limit >= len(examples):
        return examples
    order = sorted(range(len(examples)), key=lambda index: examples[index].digest)
    return tuple(examples[index] for index in sorted(order[:limit]))


def _hash(contents: Sequence[bytes]) -> str:
    parts = b"".join(hashlib.sha256(content).digest() for content in contents)
    return hashlib.sha256(parts).hexdigest()

"""A task's data: its examples, which split each stands in, and a hash of what was read.

`check_tasks` reads and checks everything before a model is loaded; nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from moe_evo.config.check import require_unset
from moe_evo.config.task import AUTO, DEFAULT, SPLITS, TaskConfig
from moe_evo.errors import ConfigError, TaskError
from moe_evo.tasks.examples import Example, kind_of
from moe_evo.tasks.fields import FieldMapping
from moe_evo.tasks.kinds import KINDS, SHARE
from moe_evo.tasks.sources import Source, few_shot_sources, sources_of, split_shares, task_name
from moe_evo.tasks.weighted_metric import parts_of

REPORTED = "search_reported"
"""All examples of the search split scored by `metric`, for the report of a search that saw something else."""
SCORINGS = (*SPLITS, REPORTED)
"""What a genome can be scored on: the search split by `search_metric`, the other splits by `metric`, and REPORTED."""
MIN_EXAMPLES = 2  # a standard error needs two


@dataclass(frozen=True)
class TaskData:
    """The checked examples of one task.

    kind and metrics are resolved, never 'auto' or 'default'. hash: sha256 of what was read.
    """

    config: TaskConfig
    name: str
    kind: str
    metric: str
    search_metric: str
    splits: Mapping[str, tuple[Example, ...]]
    few_shot: tuple[Example, ...]
    hash: str
    dropped: Mapping[str, int] = field(default_factory=dict)


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
    mapping = FieldMapping(config.fields, f"tasks ({task_name(config)}).fields")
    sources, taken = sources_of(config)
    tables = {name: Table.read(source, mapping) for name, source in sources.items()}
    shot_tables = [Table.read(source, mapping) for source in few_shot_sources(config)]
    kind = config.kind if config.kind != AUTO else next(iter(tables.values())).kind
    metric, search_metric = _metrics(config, kind)
    if len(set(taken.values())) == len(SPLITS):
        reason = "as each split has data of its own"
        require_unset(config, f"tasks ({task_name(config)})", ["split_shares"], reason)
    counted = [name for one in (metric, search_metric) for _, name in parts_of(one)]
    parts = {name: tuple(table.examples(kind, counted)) for name, table in tables.items()}
    few_shot = tuple(example for table in shot_tables for example in table.shots(kind))
    _check_options(config, kind, [example for part in parts.values() for example in part], few_shot)
    splits = _split(parts, taken, dict(zip(SPLITS, config.split_shares, strict=True)))
    splits, dropped = _disjoint(config, splits, few_shot)
    for split in SPLITS:
        _check_size(config, splits, split)
    limited = {split: _limit(splits[split], config.num_examples(split)) for split in SPLITS}
    hashed = _hash([table.hash for table in (*tables.values(), *shot_tables)])
    name = task_name(config)
    return TaskData(config, name, kind, metric, search_metric, MappingProxyType(limited), few_shot, hashed, dropped)


@dataclass(frozen=True)
class Table:
    """The rows of a source with the fields that tasks read. rows: (place, row) each. hash: sha256 of what was read."""

    source: Source
    rows: tuple[tuple[str, Any], ...]
    mapping: FieldMapping
    hash: bytes

    @classmethod
    def read(cls, source: Source, mapping: FieldMapping) -> Table:
        """Raises TaskError."""
        rows = tuple((where, mapping(row, where)) for where, row in source.rows())
        if not rows:
            raise TaskError(f"{source.shown}: is empty, expected rows with a prompt, or with what fields names")
        if source.has_only_texts:
            rows = tuple((where, _with_index(row)) for where, row in rows)
        if source.content is not None:
            return cls(source, rows, mapping, hashlib.sha256(source.content).digest())
        content = json.dumps([row for _, row in rows], sort_keys=True, default=str)
        return cls(source, rows, mapping, hashlib.sha256(content.encode()).digest())

    @property
    def kind(self) -> str:
        """The kind of task that its first row speaks of."""
        where, row = self.rows[0]
        if not isinstance(row, dict):
            raise TaskError(f"{where}: got {type(row).__name__}, expected a JSON object")
        return kind_of(row, where)

    def examples(self, kind: str, metrics: Sequence[str]) -> Iterator[Example]:
        """The examples, each of which suits all `metrics`."""
        parse = KINDS[kind].parse
        for where, row in self.rows:
            try:
                example, *_ = [parse(row, metric, where) for metric in dict.fromkeys(metrics)]
            except TaskError as error:
                raise self.mapping.explained(error, where) from error
            yield example

    def shots(self, kind: str) -> Iterator[Example]:
        """Few-shot examples: as the task's own, or, where those have no answers, any that have one."""
        shot_kind = self.kind if kind == "distillation" else kind
        if shot_kind == "perplexity":
            raise TaskError(f"{self.source.shown}: few-shot examples have texts, expected prompts with answers")
        return self.examples(shot_kind, [DEFAULT])


def _with_index(row: Any) -> Any:
    """A row of texts whose label, where it is digits and no choice's text, is a number."""
    label, choices = row.get("label"), row.get("choices", [])
    if isinstance(label, str) and label.strip().isdecimal() and label.strip() not in choices:
        return {**row, "label": int(label)}
    return row


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


def _check_options(config: TaskConfig, kind: str, own: Sequence[Example], few_shot: Sequence[Example]) -> None:
    """Refuse options of the prompt where there are texts and no prompts, and chats without a chat template."""
    where, examples = f"tasks ({task_name(config)})", (*few_shot, *own)
    for option in ("prefix", "few_shot", "chat_template", "answer_prefix"):
        if getattr(config, option) and any(example.text for example in examples):
            raise ConfigError(
                f"{where}.{option}: got {getattr(config, option)!r}, expected none, as the task's examples are texts "
                f"without prompts (kind {kind})"
            )
    if config.extract and not KINDS[kind].compares_answers:
        raise ConfigError(f"{where}.extract: got {config.extract!r}, expected none for a task of kind {kind}")
    chat = next((one for one in examples if one.turns or one.system), None)
    if chat is not None and not config.chat_template:
        raise ConfigError(
            f"{where}.chat_template: got false, expected true, as {chat.where} has several turns or a system text"
        )
    if (shot := next((one for one in few_shot if one.system), None)) is not None:
        raise ConfigError(
            f"{where}.few_shot: {shot.where} has a system text, expected none; set system for all prompts"
        )
    if config.system and (other := next((one for one in own if one.system), None)) is not None:
        raise ConfigError(f"{where}.system: got {config.system!r}, expected none, as {other.where} has its own")


def _split(
    parts: Mapping[str, Sequence[Example]], taken: Mapping[str, str], shares: Mapping[str, float]
) -> dict[str, tuple[Example, ...]]:
    """The examples by split. parts: by source. taken: the source that each split takes.

    Splits that share a source divide it by a hash: the same prompt always lands in the same split, in any file and on
    any machine.
    """
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for source, examples in parts.items():
        own = split_shares(shares, taken, source)
        *first, last = own
        for example in examples:
            position = int(example.digest[:13], 16) / 16**13
            end = 0.0
            for split in first:
                end += own[split]
                if position < end:
                    splits[split].append(example)
                    break
            else:
                splits[last].append(example)
    return {split: tuple(part) for split, part in splits.items()}


def _disjoint(
    config: TaskConfig, splits: Mapping[str, Sequence[Example]], few_shot: Sequence[Example]
) -> tuple[dict[str, tuple[Example, ...]], dict[str, int]]:
    """The splits without inputs that another one has, and how many were left out; else raises TaskError.

    The few-shot examples keep an input, else test, else validation.
    """
    owner: dict[tuple[str, tuple[str, ...]], tuple[str, str]] = {}
    for split in ("few_shot", *reversed(SPLITS)):
        for example in few_shot if split == "few_shot" else splits[split]:
            owner.setdefault(example.key, (split, example.where))
    repeated = [
        (split, example) for split in SPLITS for example in splits[split] if owner[example.key][0] != split
    ]  # fmt: skip
    if repeated and not config.drop_repeated:
        (split, example), number = repeated[0], len(repeated)
        other, where = owner[example.key]
        more = f" (and {number - 1} more such)" if number > 1 else ""
        raise TaskError(
            f"task {task_name(config)}: {example.where} ({split}) repeats the input of {where} ({other}){more}; "
            "expected each input in one of them only; remove one of the two, or set drop_repeated"
        )
    kept = {split: tuple(one for one in splits[split] if owner[one.key][0] == split) for split in SPLITS}
    return kept, {split: len(splits[split]) - len(kept[split]) for split in SPLITS}


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


def _hash(hashes: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(hashes)).hexdigest()

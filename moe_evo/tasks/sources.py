"""Where a task's rows come from: files, the embedded tasks, or a dataset of the library `datasets`; and which of them
each split takes.

A source is a file, or one split of a dataset, with its own name there. One source may serve several splits, which then
divide it by a hash of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from moe_evo.config.task import HUB, SPLITS, TaskConfig
from moe_evo.errors import TaskError
from moe_evo.files.tables import TableError, has_only_texts, rows_of, text_lines, without_endings
from moe_evo.shown import shown

WHOLE = ""
"""The name of a source that is not divided into splits."""

_USUAL = {"search": ("search", "train"), "validation": ("validation",), "test": ("test",)}
"""The sources that a split takes where `TaskConfig.splits` does not say, in this order."""


@dataclass(frozen=True)
class Source:
    """Rows with the place where each stands, for error messages.

    shown: the name for error messages. rows: reads them; raises TaskError. content: the bytes of a file, or None.
    has_only_texts: whether numbers are written as texts, as in CSV.
    """

    shown: str
    rows: Callable[[], Iterator[tuple[str, Any]]]
    content: bytes | None = None
    has_only_texts: bool = False


def embedded_task_names() -> list[str]:
    """The tasks that come with this package."""
    folder = _embedded_folder()
    return sorted(one.name for one in folder.iterdir() if one.is_dir()) if folder.is_dir() else []


def task_name(config: TaskConfig) -> str:
    """The name given, or that of the data's file, folder or dataset."""
    if config.name:
        return config.name
    if config.data.startswith(HUB):
        bare = config.data.removeprefix(HUB).partition("@")[0]
        return Path(bare).expanduser().absolute().name + (f"-{config.subset}" if config.subset else "")
    return without_endings(Path(config.data).expanduser().absolute().name)


def sources_of(config: TaskConfig) -> tuple[dict[str, Source], dict[str, str]]:
    """The sources by name, and for each split the name of the one that it takes; raises TaskError."""
    if config.data.startswith(HUB):
        return _library_sources(config)
    # a bare name is an embedded task even where a folder of that name lies about: write ./name for that
    if config.data in embedded_task_names():
        folder: Traversable = _embedded_folder().joinpath(config.data)
    else:
        folder = Path(config.data).expanduser()
    if folder.is_file():
        _check_no_splits(config, "one file, which is split by a hash of the prompt")
        return {WHOLE: read_source(folder, config.data)}, dict.fromkeys(SPLITS, WHOLE)
    if not folder.is_dir():
        raise TaskError(
            f"{_where(config)}: data: got {shown(config.data)}, which is no file, no folder and no embedded task; "
            f"embedded tasks are {', '.join(embedded_task_names()) or 'none'}; hf:OWNER/NAME is a Hugging Face dataset"
        )
    files = _files_by_name(config, folder)
    taken = _taken(config, list(files), "of the names search (or train), validation and test, such as search.jsonl")
    found = {
        name: read_source(files[name], f"{config.data}/{files[name].name}") for name in dict.fromkeys(taken.values())
    }
    return found, taken


def few_shot_sources(config: TaskConfig) -> list[Source]:
    """The file of few-shot examples, if there is one."""
    if config.few_shot is None:
        return []
    path = Path(config.few_shot).expanduser()
    if not path.is_file():
        raise TaskError(f"{_where(config)}: few_shot: no file {shown(config.few_shot)}")
    return [read_source(path, config.few_shot)]


def read_source(file: Traversable, shown: str) -> Source:
    """A file of rows; raises TaskError where it cannot be read."""
    content = read_bytes(file, shown)
    return Source(shown, partial(_rows_of_file, shown, content), content, has_only_texts(file.name))


def read_bytes(file: Traversable, shown: str) -> bytes:
    """Raises TaskError where a file cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise TaskError(f"{shown}: cannot be read: {error.strerror}") from error


def text_rows(shown: str, content: bytes) -> Iterator[tuple[str, str]]:
    """(file:line, text) of each line of plain text that is not blank; raises TaskError."""
    try:
        for place, text in text_lines(content):
            yield f"{shown}{place}", text
    except TableError as error:
        raise TaskError(f"{shown}{error}") from error


def _rows_of_file(shown: str, content: bytes) -> Iterator[tuple[str, Any]]:
    try:
        for place, row in rows_of(shown, content):
            yield f"{shown}{place}", row
    except TableError as error:
        raise TaskError(f"{shown}{error}") from error


def _embedded_folder() -> Traversable:
    return resources.files("moe_evo").joinpath("data", "tasks")


def _where(config: TaskConfig) -> str:
    return f"task {task_name(config)}"


def _files_by_name(config: TaskConfig, folder: Traversable) -> dict[str, Traversable]:
    """The folder's files of rows by their names without endings."""
    found: dict[str, Traversable] = {}
    for file in sorted(folder.iterdir(), key=lambda one: one.name):
        name = without_endings(file.name)
        if name == file.name or not file.is_file():
            continue
        if name in found and name in (*_USUAL["search"], *SPLITS, *config.splits.values()):
            raise TaskError(
                f"{_where(config)}: data: folder {config.data!r} has both {found[name].name} and {file.name}; expected "
                "one file a split"
            )
        found[name] = file
    return found


def _taken(config: TaskConfig, names: list[str], expected: str) -> dict[str, str]:
    """For each split the source that it takes, of those that there are."""
    taken = {}
    for split in SPLITS:
        usual = next((one for one in _USUAL[split] if one in names), None)
        chosen = config.splits.get(split, usual)
        if split in config.splits and chosen not in names and not _is_slice(config, chosen):
            raise TaskError(
                f"{_where(config)}: splits: {split}: got {shown(chosen)}, expected one of those that {config.data} "
                f"has: {', '.join(names) or 'none'}"
            )
        if chosen is not None:
            taken[split] = chosen
    missing = [split for split in SPLITS if split not in taken]
    if missing:
        is_file = not config.data.startswith(HUB)
        advice = "; hf:FOLDER reads a folder of the library `datasets`" if is_file else ""
        raise TaskError(
            f"{_where(config)}: data: {config.data!r} has no split for {' and '.join(missing)}, expected all "
            f"{expected}; it has {', '.join(names) or 'none'}; name them with splits, where two may share one, as in "
            f"{{search: train, validation: train, test: test}}{advice}"
        )
    return taken


def _is_slice(config: TaskConfig, name: str | None) -> bool:
    """Whether the name is a part of a split, as train[:10%], which the library `datasets` understands."""
    return config.data.startswith(HUB) and name is not None and name.endswith("]")


def _check_no_splits(config: TaskConfig, what: str) -> None:
    if config.splits:
        raise TaskError(f"{_where(config)}: splits: got {config.splits}, expected none, as data is {what}")


def _library_sources(config: TaskConfig) -> tuple[dict[str, Source], dict[str, str]]:
    from moe_evo.tasks.dataset_library import Dataset

    dataset = Dataset(_where(config), config.data.removeprefix(HUB), config.subset)
    names = dataset.split_names
    if names == [WHOLE]:
        _check_no_splits(config, "a dataset without splits, which is split by a hash of the prompt")
        taken = dict.fromkeys(SPLITS, WHOLE)
    else:
        taken = _taken(config, names, "of train, validation and test")
    shown = {name: f"{config.data} {name}".strip() for name in taken.values()}
    return {name: Source(shown[name], partial(dataset.rows, name, shown[name])) for name in shown}, taken


def split_shares(shares: Mapping[str, float], taken: Mapping[str, str], source: str) -> dict[str, float]:
    """The shares of a source that the splits have which take it; their sum is 1."""
    own = {split: shares[split] for split in SPLITS if taken[split] == source}
    whole = sum(own.values())
    return own if len(own) == len(SPLITS) else {split: share / whole for split, share in own.items()}

"""The folder of a run: names of the files in it (config, journal, genomes, result, pictures), and how to open them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

import yaml

from moe_evo.config.evaluation import SPEED_ONLY
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig, ScoringConfig, difference
from moe_evo.config.task import HUB
from moe_evo.errors import MoeEvoError, RunError
from moe_evo.files.json_text import read_json
from moe_evo.files.write import write_whole
from moe_evo.plain import Plain, PlainError, plain, value_of
from moe_evo.records.check_result import check_result
from moe_evo.records.journal import Journal
from moe_evo.records.result import RunResult, VersionError
from moe_evo.tasks.data import TaskData
from moe_evo.tasks.sources import embedded_task_names, task_name

_NAME_LENGTH = 200

_FREE_TO_CHANGE = {
    "": ("folder", "cluster", "tracking"),
    "model": (
        *("device", "self_check", "merged_cache_gib", "sharding", "offload", "offload_folder", "max_memory"),
        *("path", "revision", "alignment"),
    ),
    "evaluation": SPEED_ONLY,
    "search": ("evaluations",),
}
"""Options that may differ when a run is continued: they change where and how fast it computes, but no outcome.

Where the model lies may change, as the journal has its hash; the budget may grow.
"""

_COMMIT = re.compile("[0-9a-f]{40}")
_ASKED_REVISION = "revision"

_TOKENS = "tokens"

RunState = Literal["new", "begun", "finished"]


class RunFolder:
    """Paths of a run's files, and the checks that keep two different runs from sharing a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.journal = path / "journal.sqlite"
        self.best = path / "best.safetensors"
        self.best_pruning = path / "best_pruning.safetensors"
        self.observations = path / "observations.safetensors"
        self.finalists = path / "finalists"
        self.result = path / "result.json"
        self.figure = path / "search.png"
        self.kept_figure = path / "kept_experts.png"

    @property
    def winners(self) -> dict[str, Path]:
        """The files of genomes that can be exported, by the keys of their rows; of the front those that there are."""
        front = sorted(self.path.glob("front-*.safetensors"), key=lambda one: (len(one.name), one.name))
        return {
            "best": self.best,
            "best_pruning": self.best_pruning,
            "soup": self.genome_file("soup"),
            **{one.stem: one for one in front},
        }

    def genome_file(self, key: str) -> Path:
        """The file of the genome in the row with this key."""
        return self.path / f"{key}.safetensors"

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """The folder of a run that was started before."""
        folder = cls(Path(path))
        if (folder.path / "sweep.yaml").is_file():
            raise RunError(f"{path}: is a sweep; give one or more of its runs, as in {path}/runs/*")
        if not folder.config.is_file():
            raise RunError(
                f"{path}: not the folder of a run (no {folder.config.name} in it); "
                "give the folder that `moe-evo search` printed"
            )
        return folder

    def check_foreign(self) -> None:
        """Raise RunError where the folder holds other files and no run."""
        if self.path.is_dir() and not self.config.is_file():
            foreign = [one.name for one in self.path.iterdir() if not one.name.startswith((".", self.journal.stem))]
            if foreign:
                raise RunError(
                    f"{self.path}: holds other files and no run ({foreign[0]}); give a new folder with --folder"
                )

    def state(self, config: RunConfig, journal: Journal | None) -> RunState:
        """How far the run of this config has come here; raises RunError where the folder holds a run of another config.

        journal: of this folder, if there is one. Without a successful evaluation in it the state is 'new', whatever
        the config in the folder says.
        """
        if journal is None or not journal.has_evaluations:
            return "new"
        from moe_evo.config.file import read_config  # jsonargparse: not where only numbers are computed

        begun_with = read_config(self.config)
        lines = difference(_defining(begun_with), _defining(config))
        if lines:
            raise RunError(
                f"{self.path}: holds a run with another config ({'; '.join(lines)}); use another --folder, "
                f"or go on with the old config: moe-evo search --resume {self.path}"
            )
        wanted, budget = config.search.evaluations, begun_with.search.evaluations
        if wanted < budget:
            raise RunError(
                f"{self.path}: search.evaluations: got {wanted}, expected {budget} or more, as this run was begun with "
                f"{budget}; use another --folder, or go on with moe-evo search --resume {self.path}"
            )
        return "finished" if self.result.is_file() and wanted == budget else "begun"

    @contextmanager
    def claim(self, config: RunConfig) -> Iterator[Journal]:
        """Open the journal of this folder for writing, and lock it against other processes until the block is left.

        A folder that does not exist is made. One that exists must hold a run of the same config, or nothing. If a
        `MoeEvoError` ends the block while the journal is still empty, the files made here are removed.
        """
        self.check_foreign()
        is_new, is_new_folder = not self.config.is_file(), not self.path.is_dir()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        with Journal(self.journal) as journal:
            try:
                self._keep(config, journal)
                yield journal
            except MoeEvoError:
                if is_new and journal.is_empty:
                    self._leave(and_folder=is_new_folder)
                raise

    def _leave(self, *, and_folder: bool) -> None:
        """Remove the files that `claim` made, unless the folder holds others, too."""
        ours = [self.config, *self.path.glob(f"{self.journal.stem}.*")]
        if set(self.path.iterdir()) <= set(ours):
            for one in ours:
                one.unlink(missing_ok=True)
            if and_folder:
                self.path.rmdir()

    def _keep(self, config: RunConfig, journal: Journal) -> None:
        """Compare the config with the one in the folder, then write it there."""
        state = self.state(config, journal)
        if state == "finished":
            return  # the config of a finished run is the one that it was run with
        if state == "new":
            journal.clear()
        try:
            self._set_aside_result()
            write_whole(self.config, yaml.safe_dump(asdict_plain(config), sort_keys=False, allow_unicode=True))
        except OSError as error:
            raise self._unwritable(error) from error

    def _set_aside_result(self) -> None:
        """Keep the result of a smaller budget under another name: with a result, a run counts as finished."""
        if self.result.is_file():
            kept = self.result.with_name(f"result-{datetime.now(UTC):%Y%m%dT%H%M%S}.json")
            self.result.replace(kept)

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(f"{self.path}: cannot be written ({error.strerror}); choose another folder with --folder")

    def open_journal(self) -> Journal:
        """The journal, for reading."""
        return Journal(self.journal, read_only=True)

    def write_result(self, result: RunResult) -> None:
        write_whole(self.result, json.dumps(plain(result), indent=2, ensure_ascii=False) + "\n")

    def read_result(self) -> RunResult:
        """The result of a finished run, of this or an older version."""
        if not self.result.is_file():
            raise RunError(f"{self.path}: this run is not finished; go on with: moe-evo search --resume {self.path}")
        again = "delete it and run the same search again, it is made anew"
        data = read_json(self.result, RunError, again)
        try:
            result = value_of(RunResult, data)
            check_result(result)
        except VersionError as error:
            raise RunError(f"{self.result}: {error}") from error
        except PlainError as error:
            raise RunError(f"{self.result}: {error}; {again}") from error
        return result


def asdict_plain(config: RunConfig) -> Plain:
    """The config as plain data, as YAML holds it."""
    data: Plain = json.loads(json.dumps(asdict(config)))
    return data


def _defining(config: RunConfig) -> Plain:
    """The options on which outcomes depend; two configs that agree in them are the same run."""
    data = asdict_plain(config)
    for section, keys in _FREE_TO_CHANGE.items():
        part = data[section] if section else data
        for key in keys:
            del part[key]
    for task, told in zip(config.tasks, data["tasks"], strict=True):
        # the journal has the hash of a task's data, whose path may differ on another machine
        told |= {"name": task_name(task), "data": "", "few_shot": task.few_shot is not None}
    data["search"]["warm_start"] = config.search.warm_start is not None  # the journal has the hash of its prunings
    return data


def default_folder(config: RunConfig) -> Path:
    """The folder in runs/ whose name is made of the options in which runs usually differ."""
    tasks = as_file_name("+".join(map(task_name, config.tasks)))
    tail = f"-{config.search.algorithm}-seed{config.search.seed}"
    return Path("runs") / (f"{tasks}-keep{config.search.kept_label}"[: _NAME_LENGTH - len(tail)] + tail)


def as_file_name(text: str) -> str:
    """The text as part of a file's name, which cannot lead to another folder."""
    return re.sub(r"[/\\\x00-\x1f\x7f]", "-", text)


Config = TypeVar("Config", bound=ScoringConfig)


def with_absolute_paths(config: Config) -> Config:
    """The config with its local paths absolute, so that it means the same from any folder."""
    embedded = embedded_task_names()
    model = replace(config.model, path=_absolute(config.model.path, [ModelConfig().path]))
    if model.offload_folder is not None:
        model = replace(model, offload_folder=str(Path(model.offload_folder).expanduser().absolute()))
    if model.alignment is not None:
        model = replace(model, alignment=str(Path(model.alignment).expanduser().absolute()))
    if isinstance(config, RunConfig) and config.search.warm_start is not None:
        warm_start = str(Path(config.search.warm_start).expanduser().absolute())
        config = replace(config, search=replace(config.search, warm_start=warm_start))
    tasks = [
        replace(task, data=_absolute(task.data, embedded), few_shot=task.few_shot and _absolute(task.few_shot, []))
        for task in config.tasks
    ]
    return replace(config, model=model, tasks=tasks)


def _absolute(path: str, names: Sequence[str]) -> str:
    """The path made absolute if it exists; anything else, such as a Hugging Face name, is returned unchanged."""
    prefix = HUB if path.startswith(HUB) else ""
    local = Path(path.removeprefix(prefix)).expanduser()
    if path in names or len(local.name) > _NAME_LENGTH or not local.exists():
        return path
    return f"{prefix}{local.absolute()}"


def task_hashes(data: Sequence[TaskData]) -> dict[str, str]:
    """The hash of each task's data, by the name that `check_inputs` compares it under."""
    return {f"task {one.name}": one.hash for one in data}


def token_hashes(digests: Mapping[str, str]) -> dict[str, str]:
    """The hash of the tokens that each task's examples became, likewise; digests: `Task.digest` by name."""
    return {f"{_TOKENS} of task {name}": digest for name, digest in digests.items()}


def check_inputs(journal: Journal, hashes: Mapping[str, str]) -> dict[str, str]:
    """Compare hashes of the model and data with those in the journal; raises RunError where one has changed.

    Returns the hashes that the journal does not have yet, by their keys in it.
    """
    new = {}
    for name, found in hashes.items():
        known = journal.meta(f"hash/{name}")
        if known is None:
            new[f"hash/{name}"] = found
        elif known != found and name.startswith(_TOKENS):
            raise RunError(
                f"{journal.path.parent}: the {name} are not those that this run began with; bring back the versions of "
                "transformers and tokenizers of then, and a chat template that always writes the same, or start anew "
                "with another --folder"
            )
        elif known != found:
            raise RunError(
                f"{journal.path.parent}: {name} has changed since this run began; bring back the old files, "
                "or start anew with another --folder"
            )
    return new


def revision_asked(config: ModelConfig, model_hash: str) -> dict[str, str]:
    """What a journal holds beside the hash, so that `pinned` finds the commit that a branch was at."""
    return {_ASKED_REVISION: config.revision or ""} if "/" in model_hash else {}


def pinned(config: RunConfig) -> RunConfig:
    """The config with the commit of the Hugging Face model that the run in its folder began with.

    A branch moves, and a run stays with the commit that the branch was at. Everything else is left as it is, for
    `check_inputs` to judge.
    """
    journal_file = (
        RunFolder(Path(config.folder)).journal if config.folder else RunFolder(default_folder(config)).journal
    )
    if _COMMIT.fullmatch(config.model.revision or "") or not journal_file.is_file():
        return config
    with Journal(journal_file, read_only=True) as journal:
        asked, model_hash = journal.meta(_ASKED_REVISION), journal.meta("hash/model") or ""
    name, _, commit = model_hash.partition("+")[0].rpartition("@")
    if name != config.model.path or asked != (config.model.revision or "") or not _COMMIT.fullmatch(commit):
        return config
    return replace(config, model=replace(config.model, revision=commit))


def resumed_config(folder: str) -> RunConfig:
    """The config of the run in `folder`, wherever the folder lies now."""
    from moe_evo.config.file import read_config

    return replace(read_config(RunFolder.existing(folder).config), folder=folder)

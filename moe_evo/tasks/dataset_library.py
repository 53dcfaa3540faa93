"""Datasets of Hugging Face's library `datasets`, an extra: by name on the hub, or in a local folder.

No code of a dataset is run, and its pictures and sounds are not decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_evo.errors import TaskError
from moe_evo.files.tables import rows_of_batches

_ROWS_AT_ONCE = 1024
_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` writes: of several splits, of one


class Dataset:
    """A dataset by name, name@revision, or folder; raises TaskError where it cannot be read.

    where: for error messages. subset: the dataset's configuration, or ''.
    """

    def __init__(self, where: str, name: str, subset: str) -> None:
        self._where = where
        self._library = _library(where)
        folder = Path(name).expanduser()
        self._name, self._revision = name, None
        if folder.is_dir():
            self._name = str(folder)
        elif "@" in name:
            self._name, _, self._revision = name.rpartition("@")
        self._subset = subset or None
        self._is_saved = any((folder / one).is_file() for one in _SAVED)

    @cached_property
    def split_names(self) -> list[str]:
        """The names of its splits; [''] of a folder that `save_to_disk` wrote of one."""
        if self._is_saved:
            saved = self._saved
            return list(saved) if isinstance(saved, self._library.DatasetDict) else [""]
        names = self._library.get_dataset_split_names
        return list(self._reading(names, self._name, self._subset, revision=self._revision))

    def rows(self, split: str, shown: str) -> Iterator[tuple[str, Any]]:
        """(place, row) of each row of a split. shown: its name for the places."""
        if self._is_saved:
            rows = self._saved[split] if split else self._saved
        else:
            load = self._library.load_dataset
            rows = self._reading(load, self._name, self._subset, split=split, revision=self._revision)
        tables = rows.with_format("arrow").iter(_ROWS_AT_ONCE)
        for place, row in rows_of_batches(tables):
            yield f"{shown}{place}", row

    @cached_property
    def _saved(self) -> Any:
        return self._reading(self._library.load_from_disk, self._name)

    def _reading(self, read: Any, *given: Any, **named: Any) -> Any:
        library = self._library
        library.disable_progress_bars()
        library.logging.set_verbosity_error()
        try:
            return read(*given, **named)
        except (OSError, ValueError, KeyError, RuntimeError, library.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())[:300]
            raise TaskError(
                f"{self._where}: data: the dataset {self._name!r} cannot be read ({type(error).__name__}: {reason}); "
                "give hf:OWNER/NAME with subset and splits that it has, or hf:FOLDER"
            ) from error


def _library(where: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise TaskError(
            f"{where}: data: hf: needs the library `datasets`, which is not installed; pip install 'moe_evo[datasets]'"
        ) from error
    return datasets

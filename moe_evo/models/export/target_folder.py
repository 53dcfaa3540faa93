"""The folder of an export: written whole or not at all, and never in place of something that is no export."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_evo.errors import ExportError

EXPORT_RECORD = "moe_evo.json"
"""Every exported checkpoint holds this file."""


def check_target(folder: Path, source: Path, *, overwrite: bool) -> None:
    """Raise ExportError unless `folder` may be written; `source` is the model that is exported.

    Only what an export wrote before, which holds EXPORT_RECORD, is ever replaced.
    """
    for one in (folder, *folder.parents):
        if one.exists() and not one.is_dir():
            raise ExportError(f"{folder}: {one.name} is not a folder; give another one")
    if not _is_taken(folder):
        return
    if not overwrite:
        raise ExportError(f"{folder}: is not empty; give another folder, or replace it with --overwrite")
    if folder.resolve() == source.resolve():
        raise ExportError(f"{folder}: is the model that is being exported; give another folder")
    if not (folder / EXPORT_RECORD).is_file():
        raise ExportError(f"{folder}: was not written by moe_evo, so it is not overwritten; give another folder")


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place if the block ends without an error.

    After an error it is removed and `folder` is as it was. OSError becomes ExportError.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _open_to_readers(temporary)
        _move_into_place(temporary, folder)
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open_to_readers(folder: Path) -> None:
    """Weights are written for their owner alone; a server that runs as another user must read them too."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)


def _move_into_place(temporary: Path, folder: Path) -> None:
    """Rename; an old checkpoint steps aside first and comes back if that fails."""
    if not _is_taken(folder):
        os.replace(temporary, folder)
        return
    aside = temporary.with_suffix(".old")
    os.replace(folder, aside)
    try:
        os.replace(temporary, folder)
    except OSError:
        os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _is_taken(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())

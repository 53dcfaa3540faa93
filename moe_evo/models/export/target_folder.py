"""The folder of an export: written whole or not at all, and in place of nothing but what an export wrote before."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

from moe_evo.errors import ExportError
from moe_evo.files.json_text import JsonError, json_of
from moe_evo.files.write import mask, whole_folder
from moe_evo.shown import line_of

EXPORT_RECORD = "moe_evo.json"
"""Every exported checkpoint holds this file. Its `files` are all that the export wrote."""

_BESIDE = ("moe_evo/genome.safetensors", "moe_evo/alignment.safetensors", "moe_evo/recovery.json",
           "moe_evo/recovery.png")  # fmt: skip
"""What prune and recover write into the folder of their export afterwards."""

_OF_OLDER_EXPORTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "README.md",
                     EXPORT_RECORD, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
                     "merges.txt", "chat_template*", "*.model")  # fmt: skip
"""What the exports wrote whose record does not tell."""


def check_target(folder: Path, source: Path, *, overwrite: bool) -> None:
    """Raise ExportError unless `folder` may be written; `source` is the model that is exported.

    Only what an export wrote before, which holds EXPORT_RECORD, is ever replaced.
    """
    try:
        _check_target(folder, source, overwrite=overwrite)
    except OSError as error:
        raise ExportError(f"{folder}: cannot be read ({error.strerror}); give another folder") from error


def _check_target(folder: Path, source: Path, *, overwrite: bool) -> None:
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

    After an error it is removed and `folder` is as it was. Files in `folder` that no export wrote are in the new one,
    too. Where `folder` is a link, it stays one. An error in writing becomes ExportError.
    """
    place = Path(os.path.realpath(folder))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _finish_last(place)
        with whole_folder(place) as temporary:
            yield temporary
            _open_to_readers(temporary)
            _record_files(temporary)
            _carry_over(place, temporary)
            _move_into_place(temporary, place)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{folder}: cannot be written ({line_of(error)}); make room, or give another one") from error


def _open_to_readers(folder: Path) -> None:
    """Weights are written for their owner alone; a server that runs as another user must read them too."""
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask())


def _record_files(folder: Path) -> None:
    file = folder / EXPORT_RECORD
    record = json_of(file.read_bytes()) if file.is_file() else {}
    record["files"] = sorted({one.name for one in folder.iterdir()} | {EXPORT_RECORD})
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _carry_over(old: Path, new: Path) -> None:
    """Put into the new export what somebody has added to the old one."""
    for file in _added(old) if old.is_dir() else ():
        target = new / file.relative_to(old)
        if target.exists():
            raise ExportError(
                f"{file}: was not written by an export, and the new one has a file of that name; move it elsewhere"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target, follow_symlinks=False)
        except OSError:  # a file system without hard links
            shutil.copy2(file, target, follow_symlinks=False)


def _added(folder: Path) -> Iterator[Path]:
    """The files in an export's folder that no export wrote."""
    try:
        record = json_of((folder / EXPORT_RECORD).read_bytes())
    except (OSError, JsonError):
        record = None
    files = record.get("files") if isinstance(record, dict) else None
    known = [one for one in files if isinstance(one, str)] if isinstance(files, list) else None
    for base, folders, names in os.walk(folder):
        links = [one for one in folders if (Path(base) / one).is_symlink()]
        for file in (Path(base) / name for name in (*names, *links)):
            name = file.relative_to(folder).as_posix()
            is_old = "/" not in name and any(fnmatch(name, pattern) for pattern in _OF_OLDER_EXPORTS)
            if not (name in _BESIDE or (is_old if known is None else name in known)):
                yield file


def _move_into_place(temporary: Path, folder: Path) -> None:
    """Let the two change places, so that there is one at any moment; where that cannot be, one after the other."""
    if not _is_taken(folder):
        os.replace(temporary, folder)
        return
    if _exchanged(temporary, folder):
        return
    aside = temporary.with_suffix(".old")
    os.replace(folder, aside)
    try:
        os.replace(temporary, folder)
    except OSError:
        os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the system could let two folders change places; raises OSError where it could, and failed."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # what file systems say that cannot
        return False
    raise OSError(code, os.strerror(code), str(other))


def _finish_last(folder: Path) -> None:
    """Undo or end what a process left that was killed between the two renames of `_move_into_place`."""
    pattern = re.compile(re.escape(f".{folder.name[:50]}.") + r"[a-z0-9_]{8}\.old")
    for aside in sorted(one for one in folder.parent.iterdir() if pattern.fullmatch(one.name)):
        if not (aside / EXPORT_RECORD).is_file():
            continue
        if _is_taken(folder):
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(aside, folder)


def _is_taken(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())

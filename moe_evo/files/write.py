"""How files and folders are written: beside their place under a name that nobody can foresee, then moved there.

So a reader finds the old or the new one, whole; a link that somebody has planted is never followed; and what a killed
process left is found by the next one, and removed.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_MOST_OF_NAME = 50  # characters of the target's name in that of the temporary one: 255 bytes are allowed


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically: if this fails, an older file of that name is unchanged. Raises OSError.

    A link at `path` is replaced, and what it points to stays as it is.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def write_new(path: Path, content: str | bytes) -> None:
    """As `write_whole`, for a file that is not there; raises FileExistsError, also where another process is first."""
    with whole_file(path, is_new=True) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path, *, is_new: bool = False) -> Iterator[Path]:
    """A temporary file that takes the place of `path` if the block ends without an error, else is removed.

    is_new: raise FileExistsError where there is a file by then.
    """
    _remove_leftovers(path)
    temporary, held = _held(lambda: _new_file(path))
    try:
        yield temporary
        temporary.chmod(0o666 & ~mask())
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        _link_new(temporary, path) if is_new else os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(held)


def _link_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # which, unlike a rename, replaces nothing
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with path.open("xb") as file:
            file.write(temporary.read_bytes())


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, for the block to write into and to move away; what is left is removed."""
    _remove_leftovers(path)
    temporary, held = _held(lambda: Path(tempfile.mkdtemp(".tmp", _prefix(path), path.parent)))
    try:
        temporary.chmod(0o777 & ~mask())
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(held)


def open_no_link(file: Path) -> int:
    """A descriptor of a file to read and write, which is made where there is none; raises OSError for a link."""
    return os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def mask() -> int:
    """The permissions that this process gives to nobody."""
    found = os.umask(0)
    os.umask(found)
    return found


def _prefix(path: Path) -> str:
    return f".{path.name[:_MOST_OF_NAME]}."


def _new_file(path: Path) -> Path:
    descriptor, name = tempfile.mkstemp(".part", _prefix(path), path.parent)
    os.close(descriptor)
    return Path(name)


def _held(make: Callable[[], Path]) -> tuple[Path, int]:
    """A new file or folder that is locked until its descriptor is closed, so that it is no leftover."""
    while True:
        made = make()
        held = os.open(made, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with suppress(OSError):  # a file system without locks: nobody can take it for a leftover there
            fcntl.flock(held, fcntl.LOCK_EX)
        if made.exists():
            return made, held
        os.close(held)  # another process took it for a leftover before it was locked


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of writing `path`: temporary names that no living process holds."""
    pattern = re.compile(re.escape(_prefix(path)) + r"[a-z0-9_]{8}\.(part|tmp)")
    with suppress(OSError):
        for one in [one for one in path.parent.iterdir() if pattern.fullmatch(one.name)]:
            _remove_unless_held(one)


def _remove_unless_held(leftover: Path) -> None:
    held = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    except OSError:
        return  # held, or on a file system without locks
    finally:
        os.close(held)

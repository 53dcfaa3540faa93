"""A lock that keeps two processes from working in one folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from moe_evo.errors import MoeEvoError
from moe_evo.files.write import open_no_link


def lock(file: Path, error: type[MoeEvoError]) -> IO[str]:
    """Lock `file` for this process until it is closed; the operating system releases it however the process ends.

    Raises `error` where its folder cannot be written, or where another process holds it.
    """
    try:
        held = os.fdopen(open_no_link(file), "r+", encoding="utf-8")
    except OSError as reason:
        raise error(f"{file.parent}: cannot be written ({reason.strerror}); choose another folder") from reason
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as reason:
        held.seek(0)
        owner = held.read().strip() or "unknown"
        held.close()
        raise error(
            f"{file.parent}: process {owner} is working on this run; wait for it, end it, or use another folder"
        ) from reason
    except OSError as reason:  # such as ENOLCK of a network file system
        held.close()
        raise error(
            f"{file.parent}: cannot be locked ({reason.strerror}); choose another folder, on a file system with locks"
        ) from reason
    held.truncate(0)
    held.write(str(os.getpid()))
    held.flush()
    return held

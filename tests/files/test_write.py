"""Files appear whole or not at all, links are never followed, and what a killed process left is removed."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from moe_evo.errors import JournalError
from moe_evo.files.write import whole_file, whole_folder, write_whole
from moe_evo.records.lock import lock

# writes half of a file or folder, says so, and waits to be killed
_WRITER = """
import sys, time
from pathlib import Path
from moe_evo.files import write
with getattr(write, sys.argv[1])(Path(sys.argv[2])) as temporary:
    (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def _names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def _writer(kind: str, path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", _WRITER, kind, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize("content", ["text\n", b"\x00bytes"])
def test_a_file_is_replaced_and_nothing_lies_beside_it(tmp_path: Path, content: str | bytes) -> None:
    write_whole(tmp_path / "file", "old")
    write_whole(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert _names(tmp_path) == ["file"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", "old")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "file") as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert (tmp_path / "file").read_text() == "old" and _names(tmp_path) == ["file"]


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    for name in ("x" * 255, "ü" * 127):
        write_whole(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"


def test_a_planted_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep me")
    (tmp_path / "file").symlink_to("precious")
    write_whole(tmp_path / "file", "mine")
    assert not (tmp_path / "file").is_symlink() and (tmp_path / "precious").read_text() == "keep me"


@pytest.mark.parametrize("kind", ["whole_file", "whole_folder"])
def test_what_a_killed_process_left_is_removed_by_the_next_one_and_that_of_a_living_one_is_not(
    tmp_path: Path, kind: str
) -> None:
    target = tmp_path / "target"
    dead, living = _writer(kind, target), _writer(kind, target)
    try:
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert len(_names(tmp_path)) == 2
        with (whole_file if kind == "whole_file" else whole_folder)(target):
            assert len(_names(tmp_path)) == 2  # that of the living process, and our own
    finally:
        living.kill()
        living.wait()
        for one in (dead, living):
            assert one.stdout is not None
            one.stdout.close()
    with whole_folder(target):
        pass
    assert _names(tmp_path) == (["target"] if kind == "whole_file" else [])


def test_files_that_only_look_like_leftovers_stay(tmp_path: Path) -> None:
    names = [".target.part", ".target.12345678.part.bak", ".other.12345678.part", "target.12345678.part"]
    for name in names:
        (tmp_path / name).write_text("mine")
    write_whole(tmp_path / "target", "text")
    assert _names(tmp_path) == sorted([*names, "target"])


def test_a_lock_that_is_a_planted_link_is_refused_and_what_it_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep me")
    (tmp_path / "journal.lock").symlink_to("precious")
    with pytest.raises(JournalError, match="cannot be written"):
        lock(tmp_path / "journal.lock", JournalError)
    assert (tmp_path / "precious").read_text() == "keep me"


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:  # stands for a network file system, which is not here
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(JournalError, match=r"cannot be locked \(No locks available\); choose another folder"):
        lock(tmp_path / "journal.lock", JournalError)
    write_whole(tmp_path / "file", "text")  # needs none
    assert (tmp_path / "file").read_text() == "text"

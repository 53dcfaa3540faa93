"""A disk that is full while a checkpoint is written: one line, exit code 2, and what was there before is unchanged.

Stood in for by a limit on the size of files, at which the kernel refuses to write as it does on a full disk.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 2**20  # bytes; the smallest checkpoint here has 4 MiB
OLD_RUN = Path(__file__).parent.parent / "data" / "old_runs"
FAST = ["--tasks", "[{data: syll, num_search: 6, num_validation: 4, num_test: 4}]", "--model.self_check", "false"]


def limited(argv: list[str], size: int) -> subprocess.CompletedProcess[str]:
    """Run a command that can write no file larger than `size` bytes."""
    return subprocess.run(
        [sys.executable, "-m", "moe_evo", *argv],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("has_older", [False, True])
@pytest.mark.parametrize(
    "command",
    [
        ["prune", "--method", "aimer", "--num_kept", "2", *FAST],
        ["compress", "embedded", "--method", "moe_pruner", *FAST],
    ],
    ids=["prune", "compress"],
)
def test_no_half_checkpoint_is_left(command: list[str], has_older: bool, tmp_path: Path) -> None:
    target = tmp_path / "smaller"
    if has_older:
        older = limited([*command, "--to", str(target)], resource.RLIM_INFINITY)
        assert older.returncode == 0, older.stderr
    before = {file.name: file.read_bytes() for file in target.glob("*") if file.is_file()}
    done = limited([*command, "--to", str(target), "--overwrite", str(has_older).lower()], LIMIT)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("moe-evo: error: ") and "too large" in last and str(target) in last
    assert {file.name: file.read_bytes() for file in target.glob("*") if file.is_file()} == before
    assert [one.name for one in tmp_path.iterdir()] == (["smaller"] if has_older else [])

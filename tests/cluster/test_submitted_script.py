"""A script that calls `moe_evo.search`, under `ray job submit`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ray_head import SCRIPTS, ray_head

SCRIPT = """\
import moe_evo

task = {"data": "syll", "num_search": 8, "num_validation": 8, "num_test": 8}
run = moe_evo.search(
    tasks=[task], num_kept=4, evaluations=4, finalists=1, baselines=[], address="auto", num_gangs=1, folder="run"
)
print("found", run.result.best.test)
"""


def test_a_script_searches_on_the_cluster_that_it_was_submitted_to(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "script.py").write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{SCRIPT}")
    with ray_head(tmp_path / "home", num_cpus=2) as head:
        command = [str(SCRIPTS / "ray"), "job", "submit", "--address", head.dashboard, "--", sys.executable]
        done = subprocess.run(
            [*command, str(tmp_path / "script.py")],
            env=head.environment, cwd=tmp_path, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "found 0." in done.stdout or "found 1." in done.stdout, done.stdout
    assert (tmp_path / "run" / "result.json").is_file()

"""What a search on one machine never imports, although it is installed: it starts and installs quickly without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from moe_evo.runs import selection
from moe_evo.cli.main import main

HEAVY = {"wandb", "bokeh", "ray", "deepspeed", "sklearn", "matplotlib", "pandas", "pyarrow", "lm_eval"}
run_search = selection.run_search

def noting(*arguments, **options):
    rows = run_search(*arguments, **options)
    print("searched with", sorted(HEAVY & sys.modules.keys()))
    return rows

selection.run_search = noting
assert main(sys.argv[1:]) == 0
print("ended with", sorted(HEAVY & sys.modules.keys()))
"""


def test_a_search_imports_nothing_heavy_but_matplotlib_when_it_draws(tmp_path: Path) -> None:
    words = ["search", "--folder", str(tmp_path / "run"), "--search.evaluations", "4", "--selection.finalists", "2"]
    words += ["--tasks", "[{data: syll, num_search: 8, num_validation: 4, num_test: 4}]", "--evaluation.threads", "1"]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith(("searched", "ended"))]
    assert told == ["searched with []", "ended with ['matplotlib']"]
    assert (tmp_path / "run" / "search.png").is_file()

"""The examples in docstrings run: each module by itself, as they give names to things."""

from __future__ import annotations

import subprocess
import sys

import pytest

MODULES = [
    "moe_evo.criteria.registry",
    "moe_evo.plugins",
    "moe_evo.searches.base",
    "moe_evo.tasks.kinds",
    "moe_evo.tasks.task",
    "moe_evo.testing.families",
    "moe_evo.testing.methods",
    "moe_evo.testing.pools",
    "moe_evo.testing.recovery",
    "moe_evo.testing.searches",
    "moe_evo.testing.tasks",
]
PROGRAM = """
import doctest, importlib, sys
found = doctest.testmod(importlib.import_module(sys.argv[1]))
sys.exit(found.failed > 0 or found.attempted == 0)
"""


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, module], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

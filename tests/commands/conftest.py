"""What is recovered in tests: a pruned checkpoint, and a finished run."""

from __future__ import annotations

from pathlib import Path

import pytest
from recoveries import OPTIONS

from moe_evo.cli.main import main


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the embedded model with two experts in each layer."""
    target = tmp_path_factory.mktemp("pruned") / "checkpoint"
    words = ["--method", "aimer", "--num_kept", "2", "--to", str(target)]
    assert main(["prune", *OPTIONS, *words]) == 0
    return target


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose winner has three experts in each layer."""
    folder = tmp_path_factory.mktemp("run") / "run"
    words = ["--search.num_kept", "3", "--search.evaluations", "4", "--selection.finalists", "2"]
    assert main(["search", *OPTIONS, *words, "--selection.baselines", "[]", "--folder", str(folder)]) == 0
    return folder

"""A run of a search of another package that tells nothing of its phases."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_evo.commands.search import search as search_command
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.searches.base import Search
from moe_evo.searches.eep import EEPSearch
from moe_evo.searches.registry import SEARCHES
from moe_evo.tracking.terminal import TerminalTracker


def silent(space, config) -> Search:
    return EEPSearch(space, config)


def test_it_gets_one_row_under_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SEARCHES._registered, "silent", silent)
    config = RunConfig(
        model=ModelConfig(self_check=False),
        tasks=[TaskConfig(data="nli", num_search=8, num_validation=4, num_test=4)],
        search=SearchConfig(algorithm="silent", evaluations=8),
        evaluation=EvaluationConfig(threads=1),
        selection=SelectionConfig(finalists=2, random_search=True, soup=True),
        folder=str(tmp_path / "run"),
    )
    with TerminalTracker() as tracker:
        rows = search_command(config, tracker).read_result().rows
    titles = [row.title for row in rows if row.key != "soup"]
    assert titles == ["full model", "frequency pruning", "reap pruning", "random, best of 8", "silent"]

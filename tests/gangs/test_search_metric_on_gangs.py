"""On gangs a search maximises another metric than it reports just as in one process: the same numbers everywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from request_runs import MODEL, TASK

from moe_evo.commands.search import search as search_command
from moe_evo.config.cluster import ClusterConfig
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import SearchConfig
from moe_evo.genomes.population import Evaluation
from moe_evo.records.folder import RunFolder
from moe_evo.tasks.data import SCORINGS
from moe_evo.testing.pools import numbers
from moe_evo.tracking.terminal import TerminalTracker

CONFIG = RunConfig(
    model=MODEL,
    tasks=[replace(TASK, search_metric="probability")],
    search=SearchConfig(algorithm="random", num_kept=4, evaluations=12, seed=3),
    evaluation=EvaluationConfig(threads=1),
    selection=SelectionConfig(finalists=3, baselines=[]),
)
GANGS = ClusterConfig(address="local", num_gangs=2)


def run(folder: Path, cluster: ClusterConfig) -> RunFolder:
    with TerminalTracker() as tracker:
        return search_command(replace(CONFIG, cluster=cluster, folder=str(folder)), tracker)


def scores(folder: RunFolder) -> dict[tuple[str, int, str], tuple[object, ...]]:
    with folder.open_journal() as journal:
        return {
            (search, one.number, split): (one.genome.digest, *numbers(one.outcome))
            for search in ("search", "reference")
            for split in SCORINGS
            for one in journal.individuals(search, split)
        }


@pytest.mark.usefixtures("cluster")
def test_gangs_give_the_fitness_and_the_table_of_one_process(tmp_path: Path) -> None:
    alone, gangs = run(tmp_path / "alone", ClusterConfig()), run(tmp_path / "gangs", GANGS)
    found = scores(gangs)
    assert found == scores(alone) and {split for *_, split in found} == set(SCORINGS)
    with gangs.open_journal() as journal:
        searched = journal.outcomes("search", "search").values()
        assert "ready" in {kind for _, _, kind, _ in journal.gang_events()}
    for one in searched:
        assert isinstance(one, Evaluation) and one.fitness == pytest.approx(one.metrics["syll/probability"])
    for row, other in zip(gangs.read_result().rows, alone.read_result().rows, strict=True):
        assert row.digest == other.digest
        for split, score in row.scores.items():
            assert score.fitness == score.metrics["syll/accuracy"] == other.scores[split].fitness
            assert np.float32(score.standard_error) == np.float32(other.scores[split].standard_error)

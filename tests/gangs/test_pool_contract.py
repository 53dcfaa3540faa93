"""What every pool promises, with the embedded model: in this process, on one gang and on two.

The gangs are shared services, so that each model is loaded once for all tests here.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from request_runs import MODEL, TASK, complete, requests

from moe_evo.commands.search import search as search_command
from moe_evo.config.cluster import ClusterConfig
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import SearchConfig
from moe_evo.config.task import SPLITS
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.evaluation.local_pool import LocalPool
from moe_evo.evaluation.pool import Pool
from moe_evo.models.source import ModelSource
from moe_evo.records.journal import Journal
from moe_evo.runs import open_pool
from moe_evo.tasks.data import check_tasks
from moe_evo.testing.methods import evaluator_of
from moe_evo.testing.pools import PoolContract, numbers
from moe_evo.tracking.terminal import TerminalTracker

CONFIG = RunConfig(
    model=MODEL,
    tasks=[TASK],
    search=SearchConfig(algorithm="random", num_kept=4, evaluations=16, seed=3),
    evaluation=EvaluationConfig(threads=1),
    selection=SelectionConfig(finalists=3),
)
CLUSTERS = {
    "in this process": ClusterConfig(),
    "one gang": ClusterConfig(address="local", num_gangs=1, service="one gang"),
    "two gangs": ClusterConfig(address="local", num_gangs=2, service="two gangs"),
}


@pytest.fixture(scope="module")
def embedded() -> Evaluator:
    return open_pool.load_evaluator(ModelSource(MODEL), check_tasks([TASK]), CONFIG.evaluation, TerminalTracker())


@pytest.fixture(scope="module")
def folders(cluster: Cluster, embedded: Evaluator, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of finished runs of CONFIG, one a pool. They start the services, so they hear all that happens."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_pool, "load_evaluator", lambda *_: embedded)
        for name, where in CLUSTERS.items():
            folder = tmp_path_factory.mktemp("run") / "run"
            with TerminalTracker() as tracker:
                search_command(replace(CONFIG, cluster=where, folder=str(folder)), tracker)
            found[name] = folder
    return found


@pytest.fixture(params=CLUSTERS)
def pool(request: pytest.FixtureRequest, folders: dict[str, Path], embedded: Evaluator) -> Iterator[Pool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_pool, "load_evaluator", lambda *_: embedded)
        config = replace(CONFIG, cluster=CLUSTERS[request.param])
        source, data = ModelSource(config.model), check_tasks(config.tasks)
        with open_pool.open_pool(config, source, data, TerminalTracker()) as pool:
            yield pool


class TestPools(PoolContract):
    @pytest.fixture
    def evaluator(self, embedded: Evaluator) -> Evaluator:
        return embedded

    @pytest.fixture
    def pool(self, pool: Pool) -> Pool:
        return pool


class TestAPoolOfATinyModel(PoolContract):
    @pytest.fixture(params=["mixtral", "gpt_oss"])
    def evaluator(self, request: pytest.FixtureRequest) -> Evaluator:
        return evaluator_of(request.param)

    @pytest.fixture
    def pool(self, evaluator: Evaluator) -> Pool:
        return LocalPool(evaluator)


def test_a_search_leaves_the_same_journal_whatever_its_pool(folders: dict[str, Path]) -> None:
    journals = {name: scores(folder) for name, folder in folders.items()}
    assert len(journals["in this process"]) > CONFIG.search.evaluations
    assert journals["one gang"] == journals["in this process"]
    assert journals["two gangs"] == journals["in this process"]


def scores(folder: Path) -> dict[tuple[object, ...], tuple[object, ...]]:
    """(search, number, digest, split) -> scores, of all outcomes in a journal."""
    with Journal(folder / "journal.sqlite", read_only=True) as journal:
        return {
            (search, one.number, one.genome.digest, split): numbers(one.outcome)
            for search in ("search", "reference")
            for split in SPLITS
            for one in journal.individuals(search, split)
        }


def test_the_journal_of_a_run_on_gangs_tells_what_happened_to_them(folders: dict[str, Path]) -> None:
    for name, num_gangs in (("one gang", 1), ("two gangs", 2)):
        with Journal(folders[name] / "journal.sqlite", read_only=True) as journal:
            kinds = [kind for _, _, kind, _ in journal.gang_events()]
            status = journal.pool_status()
        assert kinds.count("placed") == num_gangs
        assert "ready" in kinds
        assert status is not None
        assert len(status["gangs"]) == num_gangs
        assert status["gangs"][0]["pids"]
        assert json.loads((folders[name] / "result.json").read_text())["search"]["evaluations"] == 16


def test_the_journal_of_a_run_in_this_process_tells_nothing_of_gangs(folders: dict[str, Path]) -> None:
    with Journal(folders["in this process"] / "journal.sqlite", read_only=True) as journal:
        assert journal.gang_events() == []
        assert journal.pool_status() is None


@pytest.mark.parametrize("pool", ["one gang"], indirect=True)
def test_an_idle_gang_that_is_killed_is_built_anew_and_its_scores_stay_the_same(
    pool: Pool, embedded: Evaluator
) -> None:
    wanted = requests(8, seed=30)
    before = complete(pool, wanted[:4])
    os.kill(before.pids()[0], signal.SIGKILL)
    after = complete(pool, wanted[4:])
    assert after.kinds() == ["broken", "placed", "ready"]
    expected = embedded.evaluate([one.genome for one in wanted], "search")
    outcomes = before.outcomes | after.outcomes
    assert [numbers(outcomes[n, "search"]) for n in range(8)] == [numbers(one) for one in expected]

"""Whole searches on gangs that break: what the journal holds, what the user reads, and how they resume."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from ray.cluster_utils import Cluster
from request_runs import LIMIT_S, MODEL, TASK, free_cpus, is_gone, wait_until
from stand_ins import always, die, outcome_of, unable_to_load, unable_to_start

import moe_evo
from moe_evo.commands.search import search as search_command
from moe_evo.commands.show import show
from moe_evo.config.cluster import ClusterConfig
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import SearchConfig, SurrogateConfig
from moe_evo.config.task import SPLITS
from moe_evo.errors import ClusterError, JournalError, ModelError
from moe_evo.evaluation.pool import PoolNews, PoolStatus
from moe_evo.gangs import ray_pool
from moe_evo.gangs.rank import Rank
from moe_evo.genomes.population import Evaluation, EvaluationFailure
from moe_evo.records.folder import RunFolder, asdict_plain
from moe_evo.records.journal import MAIN, Journal
from moe_evo.report.terminal import print_run
from moe_evo.tracking.terminal import TerminalTracker

pytestmark = pytest.mark.usefixtures("cluster")

Scores = dict[tuple[str, int, str], tuple[object, ...]]
"""(search, number, split) -> digest, fitness, tie-break and standard error as float32."""

SEARCHES = ("search", "reference")

CONFIG = RunConfig(
    model=MODEL,
    tasks=[TASK],
    search=SearchConfig(algorithm="random", num_kept=4, evaluations=60, seed=3),
    evaluation=EvaluationConfig(threads=1),
    selection=SelectionConfig(finalists=3),
    cluster=ClusterConfig(address="local", num_gangs=2, max_batch=4),
)


class Watch(TerminalTracker):
    """Calls `react` with the state of the gangs whenever the run hears of them."""

    def __init__(self, react: Callable[[PoolStatus], None]) -> None:
        super().__init__()
        self._react = react

    def pool(self, news: PoolNews) -> None:
        super().pool(news)
        self._react(news.status)


def search(
    folder: Path,
    config: RunConfig = CONFIG,
    rank: type[Rank] = Rank,
    react: Callable[[PoolStatus], None] = lambda status: None,
) -> RunFolder:
    with pytest.MonkeyPatch.context() as patch, Watch(react) as tracker:
        patch.setattr(ray_pool, "ray_pool", partial(ray_pool.ray_pool, rank=rank))
        return search_command(replace(config, folder=str(folder)), tracker)


def outcomes(folder: Path) -> dict[tuple[str, int, str], tuple[str, Evaluation | EvaluationFailure]]:
    """(search, number, split) -> (digest, outcome); nothing of it is there twice."""
    with Journal(folder / "journal.sqlite", read_only=True) as journal:
        return {
            (name, one.number, split): (one.genome.digest, one.outcome)
            for name in SEARCHES
            for split in SPLITS
            for one in journal.individuals(name, split)
        }


def without_times(folder: Path) -> Scores:
    """All scores of a run as float32."""
    return {
        key: (digest, *map(np.float32, (one.fitness, one.tie_break, one.standard_error)))
        for key, (digest, one) in outcomes(folder).items()
    }


def events(folder: Path, kind: str) -> list[str]:
    with Journal(folder / "journal.sqlite", read_only=True) as journal:
        return [detail for _, _, found, detail in journal.gang_events() if found == kind]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Scores:
    """The scores of CONFIG in one process, without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with TerminalTracker() as tracker:
        search_command(replace(CONFIG, cluster=ClusterConfig(), folder=str(folder)), tracker)
    return without_times(folder)


def test_a_poisonous_genome_is_in_the_journal_and_in_show_with_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], undisturbed: Scores
) -> None:
    poison = str(undisturbed["search", 20, "search"][0])
    folder = search(tmp_path / "run", rank=always(poison, die))
    found = outcomes(folder.path)
    failed = {key: one for key, (_, one) in found.items() if isinstance(one, EvaluationFailure)}
    assert failed.keys() == {("search", 20, "search")}
    failure = failed["search", 20, "search"]
    assert failure.kind == "quarantined"
    assert failure.reason.startswith("broke 3 gangs: rank 0 died")
    with Journal(folder.journal, read_only=True) as journal:
        genomes = {(name, one.number): one.genome for name in SEARCHES for one in journal.candidates(name)}
    for (name, number, split), (_, one) in found.items():
        assert (name, number, split) in failed or one == outcome_of(genomes[name, number], split)
    assert any(poison[:8] in detail for detail in events(folder.path, "quarantined"))
    print_run(folder, show(folder))
    assert "broke 3 gangs: rank 0 died" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rank", "reason"),
    [
        (unable_to_load(RuntimeError("no such symbol")), "rank 0: RuntimeError: no such symbol"),
        (unable_to_start(), "rank 0 died (ImportError: libcuda.so.1: cannot open shared object file)"),
    ],
)
def test_what_breaks_every_gang_ends_the_run_with_one_message(rank: type[Rank], reason: str, tmp_path: Path) -> None:
    config = replace(CONFIG, cluster=replace(CONFIG.cluster, max_attempts=2))
    with pytest.raises(ClusterError) as error:
        search(tmp_path / "run", config, rank)
    assert f"no gang can load embedded: 2 failures in a row, the last: {reason}" in str(error.value)


def test_truncated_weights_end_the_run_with_the_same_message_as_without_a_cluster(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(Path(moe_evo.__file__).parent / "data" / "model", model)
    (weights,) = model.glob("*.safetensors")
    os.truncate(weights, weights.stat().st_size // 2)
    config = replace(CONFIG, model=replace(MODEL, path=str(model)), cluster=replace(CONFIG.cluster, num_gangs=1))
    with pytest.raises(ModelError) as alone:
        search_command(replace(config, cluster=ClusterConfig(), folder=str(tmp_path / "alone")), TerminalTracker())
    with pytest.raises(ModelError) as error:
        search(tmp_path / "run", config)
    assert str(error.value) == str(alone.value)


def test_a_rank_that_is_killed_in_a_collective_takes_its_gang_with_it_and_nothing_is_lost(
    tmp_path: Path, undisturbed: Scores
) -> None:
    config = replace(
        CONFIG,
        model=replace(MODEL, sharding="tensor_parallel"),
        cluster=replace(CONFIG.cluster, num_gangs=1, gang_size=2, max_batch=2),
        search=replace(CONFIG.search, evaluations=20),
    )
    killed: list[tuple[int, ...]] = []

    def react(status: PoolStatus) -> None:
        if not killed and status.evaluations > 5 and status.gangs[0].state == "busy":
            killed.append(status.gangs[0].pids)
            os.kill(killed[0][1], signal.SIGKILL)

    folder = search(tmp_path / "disturbed", config, react=react)
    assert killed
    found = outcomes(folder.path)
    assert len(events(folder.path, "broken")) == 1
    assert all(isinstance(one, Evaluation) for _, one in found.values())
    for pid in killed[0]:
        wait_until(partial(is_gone, pid), "both ranks have ended")
    for key, (_, one) in found.items():
        if key[0] == "search" and key[2] == "search":
            assert isinstance(one, Evaluation)
            assert undisturbed[key][1:3] == pytest.approx((one.fitness, one.tie_break), rel=1e-4)


def killed_search(folder: Path, address: str, after: int, *, whole_job: bool) -> None:
    """Run CONFIG as a command, and kill it once it has so many outcomes."""
    config = folder.with_suffix(".yaml")
    config.write_text(
        yaml.safe_dump(asdict_plain(replace(CONFIG, cluster=replace(CONFIG.cluster, address=address, num_gangs=1))))
    )
    command = [sys.executable, "-m", "moe_evo", "search", str(config), "--folder", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as driver:
        try:
            wait_until(
                lambda: driver.poll() is not None or num_outcomes(folder) >= after, "the run makes progress", LIMIT_S
            )
            assert driver.poll() is None, driver.stderr and driver.stderr.read()
            children = psutil.Process(driver.pid).children(recursive=True)
        finally:
            driver.kill()
    for child in children if whole_job else ():
        with suppress(psutil.NoSuchProcess):
            child.kill()


def num_outcomes(folder: Path) -> int:
    try:
        return len(outcomes(folder))
    except JournalError:
        return 0


def test_a_run_whose_processes_are_all_killed_and_then_its_driver_alone_goes_on_where_it_stood(
    cluster: Cluster, tmp_path: Path, undisturbed: Scores
) -> None:
    folder = tmp_path / "run"
    free = free_cpus()
    killed_search(folder, "local", 5, whole_job=True)
    first = without_times(folder)
    killed_search(folder, cluster.address, len(first) + 5, whole_job=False)
    second = without_times(folder)
    wait_until(lambda: free_cpus() >= free, "the gangs of the killed run are ended")
    search(folder)
    assert first.items() < second.items() < undisturbed.items()
    assert without_times(folder) == undisturbed


@pytest.mark.parametrize(
    "evaluation",
    [EvaluationConfig(threads=1, race=0.9), EvaluationConfig(threads=1, examples="fresh", sample_size=16)],
    ids=["racing", "fresh"],
)
def test_a_search_that_learns_goes_on_where_a_gang_is_killed(tmp_path: Path, evaluation: EvaluationConfig) -> None:
    config = replace(
        CONFIG,
        tasks=[replace(TASK, num_search=40)],
        search=SearchConfig(
            algorithm="surrogate", num_kept=4, evaluations=40, seed=3, surrogate=SurrogateConfig(num_warmup=10, batch=5)
        ),
        evaluation=evaluation,
        cluster=replace(CONFIG.cluster, max_batch=1),
    )
    killed: list[tuple[int, ...]] = []

    def react(status: PoolStatus) -> None:
        if not killed and status.evaluations > 15 and status.gangs[0].state == "busy":
            killed.append(status.gangs[0].pids)
            os.kill(killed[0][0], signal.SIGKILL)

    folder = search(tmp_path / "run", config, react=react)
    assert killed and len(events(folder.path, "broken")) == 1
    with folder.open_journal() as journal:
        told, candidates = journal.told(MAIN), journal.candidates(MAIN)
        samples = {one.number: one.evaluation.sample for one in journal.individuals(MAIN)}
    assert len(told) == len({one.genome.digest for one in candidates}) == 40
    assert all(isinstance(one, Evaluation) for one in told.values())
    operators = {one.operator for one in candidates if one.number >= 10}
    assert {"guided_mutation", "crossover"} & operators
    fresh = {number: number // 10 for number in range(40)}
    assert samples == (fresh if evaluation.is_fresh else dict.fromkeys(range(40)))

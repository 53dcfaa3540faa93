"""When a gang counts as hung: a request may take any time as long as its ranks make progress."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from request_runs import MODEL, TASK, assert_scores, complete, gangs, genomes, requests
from stand_ins import hang, once, progressing

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.gangs import ray_pool
from moe_evo.gangs.dispatcher import Dispatcher, Job
from moe_evo.gangs.rank import Rank
from moe_evo.gangs.ray_pool import work_of
from moe_evo.gangs.service_spec import ServiceSpec
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation
from moe_evo.models.source import ModelSource
from moe_evo.tasks.data import check_tasks


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pool, "ServiceSpec", partial(ServiceSpec, longest_silence_s=2.0))


def test_the_longest_time_is_that_of_jobs_on_the_same_examples() -> None:
    genome = Genome.from_kept([[0, 1]], 4, 1)
    search, test = Job("work", "search", genome), Job("work", "test", genome)
    dispatcher = Dispatcher(max_batch=4, max_attempts=3)
    dispatcher.join("run")
    dispatcher.submit("run", [(0, search), (1, test)])
    assert dispatcher.take(1) == (search,)
    dispatcher.finish((search,), [Evaluation(0.5)], 2.0)
    assert dispatcher.longest_s((search,)) == 2.0
    assert dispatcher.longest_s((test,)) is None  # a split of thousands takes longer, and does not hang


@pytest.mark.usefixtures("cluster", "short_patience")
def test_a_request_that_makes_progress_may_take_longer_than_any_silence() -> None:
    wanted = requests(2)
    with gangs(progressing(6.0), num_gangs=1) as pool:
        progress = complete(pool, wanted)
    assert_scores(progress, wanted)
    assert progress.kinds() == ["placed", "ready"]


@pytest.mark.usefixtures("cluster", "short_patience")
def test_the_first_request_counts_as_hung_without_progress(tmp_path: Path) -> None:
    wanted = requests(3)
    with gangs(once(wanted[0].genome.digest, tmp_path, hang), num_gangs=1) as pool:
        progress = complete(pool, wanted)
    assert_scores(progress, wanted)
    assert [event.detail for event in progress.events if event.kind == "broken"] == [
        "no progress of rank 0 in evaluate for 2 s"
    ]


def test_a_rank_makes_progress_with_every_layer_that_it_computes() -> None:
    rank, source = Rank(0, 1), ModelSource(MODEL)
    rank.load(MODEL, source.hash, ("127.0.0.1", 0), 60.0, lambda text: None)
    work = work_of(check_tasks([TASK]), EvaluationConfig(threads=1))
    rank.begin(work, 0)
    seen = [rank.progress()]
    for genome in genomes(2):
        rank.evaluate(work.key, [genome], "search", [None])
        seen.append(rank.progress())
    assert 0 <= seen[0] < seen[1] < seen[2]
    assert seen[2] - seen[1] >= source.shape.num_layers - 1, "layers below the first that differs may be shared"

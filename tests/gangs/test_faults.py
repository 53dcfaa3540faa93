"""Whatever breaks, a run ends with every evaluation done once and the scores of an undisturbed run.

Processes are killed and stopped for real. Most ranks are stand-ins without a model, for speed; some
tests load the embedded one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ray.cluster_utils import Cluster
from request_runs import (
    Once,
    Progress,
    assert_scores,
    complete,
    free_cpus,
    gangs,
    is_gone,
    requests,
    service_pid,
    wait_until,
)
from stand_ins import (
    always,
    die,
    hang,
    in_a_collective,
    loading_when,
    once,
    raise_row_out_of_memory,
    raise_value_error,
    reporting_when,
    short_of_memory,
    slow,
)

from moe_evo.config.model import ModelConfig
from moe_evo.gangs import ray_pool
from moe_evo.genomes.population import EvaluationFailure

TENSOR_PARALLEL = ModelConfig(self_check=False, sharding="tensor_parallel")


@pytest.fixture(autouse=True)
def given_back(cluster: Cluster) -> Iterator[None]:
    """Every test gives back the room that it took."""
    before = free_cpus()
    yield
    wait_until(lambda: free_cpus() >= before, "all CPUs are given back")


def kill(progress: Progress, signal_number: int = signal.SIGKILL, gang: int = 0) -> int:
    pid = progress.pids(gang)[0]
    os.kill(pid, signal_number)
    return pid


def test_an_idle_rank_that_is_killed_is_replaced() -> None:
    wanted = requests(20)
    with gangs(num_gangs=1) as pool:
        first = complete(pool, wanted[:10])
        pid = kill(first)
        second = complete(pool, wanted[10:])
    assert_scores(first, wanted[:10])
    assert_scores(second, wanted[10:])
    assert second.kinds() == ["broken", "placed", "ready"]
    assert second.pids() != (pid,)
    assert second.status.restarts == 1


def test_a_rank_that_is_killed_while_it_loads_is_replaced(tmp_path: Path) -> None:
    wanted, file = requests(5), tmp_path / "loaded"

    def is_loading(progress: Progress) -> bool:
        return bool(progress.status.gangs) and progress.status.gangs[0].state == "loading"

    def act(progress: Progress) -> None:
        kill(progress)
        file.touch()

    with gangs(loading_when(file), num_gangs=1) as pool:
        progress = complete(pool, wanted, Once(is_loading, act))
    assert_scores(progress, wanted)
    assert progress.kinds() == ["placed", "broken", "placed", "ready"]


def test_how_far_a_rank_has_loaded_is_in_the_status(tmp_path: Path) -> None:
    wanted, file, seen = requests(2), tmp_path / "loaded", []

    def react(progress: Progress) -> None:
        seen.extend(gang.progress for gang in progress.status.gangs if gang.progress)
        if seen:
            file.touch()

    with gangs(reporting_when(file), num_gangs=1) as pool:
        progress = complete(pool, wanted, react)
    assert_scores(progress, wanted)
    assert set(seen) == {"1.5 GiB a rank after 3 s"}
    assert progress.status.gangs[0].progress == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_while_a_collective_waits_loses_nothing(rank: int, tmp_path: Path) -> None:
    wanted, inside = requests(12), tmp_path / "inside"
    fault = Once(lambda progress: inside.exists(), lambda progress: os.kill(progress.pids()[rank], signal.SIGKILL))
    with gangs(in_a_collective(inside), num_gangs=1, gang_size=2, model=TENSOR_PARALLEL) as pool:
        progress = complete(pool, wanted, fault)
    assert fault.happened
    assert_scores(progress, wanted)
    assert progress.kinds() == ["placed", "ready", "broken", "placed", "ready"]


def test_a_rank_that_is_killed_while_it_evaluates_loses_nothing() -> None:
    wanted = requests(80)
    fault = Once(lambda progress: progress.done > 30, kill)
    with gangs(slow(0.02), num_gangs=2) as pool:
        progress = complete(pool, wanted, fault)
    assert fault.happened
    assert_scores(progress, wanted)
    assert progress.kinds().count("broken") == 1


def test_a_stopped_rank_counts_as_hung_after_the_deadline_and_its_process_ends() -> None:
    wanted, stopped = requests(60), []
    fault = Once(lambda progress: progress.done > 20, lambda progress: stopped.append(kill(progress, signal.SIGSTOP)))
    with gangs(slow(0.02), num_gangs=2, deadline_s=1.0, max_batch=1) as pool:
        progress = complete(pool, wanted, fault)
        wait_until(lambda: is_gone(stopped[0]), "the stopped process has ended")
    assert_scores(progress, wanted)
    assert [event.detail for event in progress.events if event.kind == "broken"] == [
        "no answer of rank 0 to evaluate within 1 s"
    ]


def test_a_killed_service_is_started_again_and_nothing_is_lost() -> None:
    wanted = requests(120)  # enough for a while, so that both new gangs are wanted
    with gangs(slow(0.05), num_gangs=2) as pool:
        pid = service_pid(pool)
        fault = Once(lambda progress: progress.done > 30, lambda progress: os.kill(pid, signal.SIGKILL))
        progress = complete(pool, wanted, fault)
        assert service_pid(pool) != pid
    assert fault.happened
    assert_scores(progress, wanted)
    assert progress.kinds().count("ready") == 4  # two gangs, twice


def test_a_stopped_service_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pool, "_SILENCE_S", 2.0)
    wanted = requests(60)
    with gangs(slow(0.02), num_gangs=1) as pool:
        pid = service_pid(pool)
        fault = Once(lambda progress: progress.done > 20, lambda progress: os.kill(pid, signal.SIGSTOP))
        progress = complete(pool, wanted, fault)
        wait_until(lambda: is_gone(pid), "the stopped service has ended")
    assert fault.happened
    assert_scores(progress, wanted)


def test_a_genome_that_kills_every_gang_is_quarantined_and_all_others_are_scored() -> None:
    wanted = requests(20)
    with gangs(always(wanted[7].genome.digest, die), num_gangs=2) as pool:
        progress = complete(pool, wanted)
    assert_scores(progress, wanted, but=[7])
    failure = progress.outcomes[7, "search"]
    assert isinstance(failure, EvaluationFailure)
    assert failure.kind == "quarantined"
    assert failure.reason.startswith("broke 3 gangs: rank 0 died")
    (event,) = [event for event in progress.events if event.kind == "quarantined"]
    assert wanted[7].genome.digest[:8] in event.detail


def test_where_one_attempt_is_all_the_neighbours_of_a_deadly_genome_are_still_scored() -> None:
    wanted = requests(24)
    with gangs(always(wanted[18].genome.digest, die), num_gangs=1, max_attempts=1) as pool:
        progress = complete(pool, wanted)
    assert_scores(progress, wanted, but=[18])
    assert isinstance(progress.outcomes[18, "search"], EvaluationFailure)


@pytest.mark.parametrize(
    ("misbehave", "reason"),
    [(raise_value_error, "ValueError: logits have 3 dimensions"), (hang, "no answer of rank 0")],
)
def test_an_error_or_a_hang_that_does_not_come_again_costs_a_gang_and_no_genome(
    misbehave: object, reason: str, tmp_path: Path
) -> None:
    wanted = requests(10)
    with gangs(once(wanted[4].genome.digest, tmp_path, misbehave), num_gangs=1, deadline_s=1.0, max_batch=2) as pool:
        progress = complete(pool, wanted)
    assert_scores(progress, wanted)
    (broken,) = [event for event in progress.events if event.kind == "broken"]
    assert reason in broken.detail


def test_a_genome_that_always_raises_is_quarantined_with_what_the_rank_said() -> None:
    wanted = requests(6)
    with gangs(always(wanted[2].genome.digest, raise_value_error), num_gangs=1, max_attempts=2) as pool:
        progress = complete(pool, wanted)
    assert_scores(progress, wanted, but=[2])
    assert progress.outcomes[2, "search"] == EvaluationFailure(
        "quarantined", "broke 2 gangs: rank 0: ValueError: logits have 3 dimensions"
    )


def test_batches_are_halved_when_memory_runs_out_and_no_genome_is_blamed() -> None:
    wanted = requests(30)
    with gangs(short_of_memory(2), num_gangs=2, max_attempts=1) as pool:
        progress = complete(pool, wanted)
    assert_scores(progress, wanted)
    assert progress.kinds().count("batch_halved") == 2
    assert "quarantined" not in progress.kinds()


def test_a_genome_that_does_not_fit_alone_is_given_up_without_smaller_batches_for_the_others() -> None:
    wanted = requests(6)
    with gangs(always(wanted[2].genome.digest, raise_row_out_of_memory), num_gangs=1, max_attempts=2) as pool:
        progress = complete(pool, wanted)
    assert_scores(progress, wanted, but=[2])
    assert "batch_halved" not in progress.kinds()
    outcome = progress.outcomes[2, "search"]
    assert isinstance(outcome, EvaluationFailure)
    assert "one row in a batch" in outcome.reason


def test_ten_random_faults_in_one_run_lose_nothing() -> None:
    rng, wanted, faults = np.random.default_rng(1), requests(200), []

    def react(progress: Progress) -> None:
        alive = [gang for gang in progress.status.gangs if gang.pids and gang.state in ("ready", "busy")]
        if len(faults) < 10 and progress.done > 15 * (len(faults) + 1) and alive:
            gang = alive[rng.integers(len(alive))]
            number = (signal.SIGKILL, signal.SIGSTOP)[rng.integers(2)]
            if not is_gone(gang.pids[0]):
                os.kill(gang.pids[0], number)
                faults.append(gang.pids[0])

    # as many attempts as faults: chance may hit one genome again and again
    with gangs(slow(0.01), num_gangs=2, deadline_s=1.0, max_batch=2, max_attempts=11) as pool:
        progress = complete(pool, wanted, react)
        for pid in faults:
            wait_until(lambda pid=pid: is_gone(pid), f"{pid} has ended")
    assert len(faults) == 10
    assert_scores(progress, wanted)

"""Several runs on the gangs of one service, what it refuses, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from request_runs import (
    MODEL,
    TASK,
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
from stand_ins import slow, telling, telling_its_share, writing_down, writing_works_down

from moe_evo.errors import ClusterError, ConfigError, TaskError
from moe_evo.evaluation.pool import Pool, Request
from moe_evo.gangs.connection import connected
from moe_evo.gangs.rank import Rank
from moe_evo.models.source import ModelSource
from moe_evo.tasks.data import check_tasks
from moe_evo.tasks.registry import build_task

pytestmark = pytest.mark.usefixtures("cluster")


class Run(threading.Thread):
    """A run of requests in a thread of its own."""

    def __init__(self, pool: Pool, wanted: Sequence[Request]) -> None:
        super().__init__(daemon=True)
        self._pool, self._wanted = pool, wanted
        self.progress: Progress | None = None
        self.reports: list[tuple[int, int]] = []
        self.start()

    def run(self) -> None:
        self.progress = complete(self._pool, self._wanted)

    def result(self) -> Progress:
        self.join(timeout=60.0)
        assert self.progress is not None, "the run failed, see the thread's exception"
        return self.progress


def digests(file: Path) -> list[str]:
    return file.read_text().split()


def test_every_run_is_told_once_what_ranks_have_switched_off() -> None:
    notes = ("self-check: no token trees", "newer than tested: ray")
    shared = {"num_gangs": 2, "service": "telling", "idle_release_s": 1.0}
    heard: list[list[str]] = []
    with gangs(telling(*notes), **shared) as first:
        for pool in (first, None):
            with contextlib.ExitStack() as stack:
                pool = stack.enter_context(gangs(telling(*notes), **shared)) if pool is None else pool
                progress = complete(pool, requests(8, seed=len(heard)))
                heard.append([one.detail for one in progress.events if one.kind == "note"])
    assert heard == [list(notes), list(notes)], "the second run begins no work anew, and hears of it all the same"


def test_two_runs_share_the_gangs_in_fair_turns(tmp_path: Path) -> None:
    file = tmp_path / "evaluated"
    first, second = requests(120, seed=1), requests(120, seed=2)
    shared = {"num_gangs": 2, "service": "fair", "max_batch": 4, "idle_release_s": 1.0}
    with gangs(writing_down(file, 0.02), **shared) as one, gangs(writing_down(file, 0.02), **shared) as other:
        runs = [Run(one, first), Run(other, second)]
        progress = [run.result() for run in runs]
    assert_scores(progress[0], first)
    assert_scores(progress[1], second)
    order = digests(file)
    assert len(order) == len(set(order)) == 240
    of_first = {one.genome.digest for one in first}
    both = order[20:200]  # while both had something to do
    share = sum(digest in of_first for digest in both) / len(both)
    assert 0.4 <= share <= 0.6


def test_a_genome_that_two_runs_want_is_evaluated_once(tmp_path: Path) -> None:
    file, wanted = tmp_path / "evaluated", requests(60)
    shared = {"num_gangs": 2, "service": "common", "idle_release_s": 1.0}
    with gangs(writing_down(file, 0.01), **shared) as one, gangs(writing_down(file, 0.01), **shared) as other:
        runs = [Run(one, wanted), Run(other, wanted[::-1])]
        for run in runs:
            assert_scores(run.result(), wanted)
    assert set(Counter(digests(file)).values()) == {1}


def test_what_ended_runs_held_is_dropped_while_another_goes_on(tmp_path: Path) -> None:
    file, others = tmp_path / "works", requests(200, seed=3)
    shared = {"num_gangs": 1, "service": "dropping", "idle_release_s": 2.0}
    with gangs(writing_works_down(file), task=replace(TASK, num_search=12), **shared) as lasting:
        with gangs(writing_works_down(file), **shared) as ended:
            assert_scores(complete(ended, requests(4)), requests(4))
        (begun,) = file.read_text().splitlines()
        deadline = time.monotonic() + 60
        while len(file.read_text().splitlines()) < 3 and time.monotonic() < deadline:
            complete(lasting, [others.pop()])
            time.sleep(0.2)
        held = ray.get(lasting.service.__ray_call__.remote(lambda one: (len(one._works), len(one._dispatcher.works))))
    lines = file.read_text().splitlines()
    assert lines[0] == begun and lines[1].startswith("begin ") and lines[2] == begun.replace("begin", "forget")
    assert held == (1, 0), "the data of the run that goes on"


@pytest.mark.parametrize(("num_gangs", "num_sharing"), [(1, 1), (2, 2), ("auto", 16)])
def test_ranks_are_told_how_many_may_share_their_nodes_memory(num_gangs: int | str, num_sharing: int) -> None:
    with gangs(telling_its_share(), num_gangs=num_gangs, idle_release_s=1.0) as pool:
        progress = complete(pool, requests(2))
    assert {one.detail for one in progress.events if one.kind == "note"} == {f"{num_sharing} share"}


def test_another_model_under_the_name_of_a_service_is_refused() -> None:
    other = replace(MODEL, dtype="bfloat16")
    shared = {"num_gangs": 1, "service": "taken", "idle_release_s": 1.0}
    with gangs(**shared):
        with pytest.raises(ClusterError, match="'taken' serves embedded with other options") as error:
            gangs(model=other, **shared).__enter__()
        with pytest.raises(ClusterError, match="other gangs"):
            gangs(**(shared | {"num_gangs": 2})).__enter__()
    assert "\n" not in str(error.value)


def test_a_service_without_runs_ends_itself_and_gives_back_its_room() -> None:
    before = free_cpus()
    with gangs(num_gangs=2, service="short", idle_release_s=1.0) as pool:
        assert_scores(complete(pool, requests(4)), requests(4))
        pid = service_pid(pool)
    wait_until(lambda: is_gone(pid), "the service has ended")
    wait_until(lambda: free_cpus() >= before, "its room is given back")


def test_a_service_that_was_lost_is_started_again_by_the_runs_that_share_it() -> None:
    wanted = requests(100)
    shared = {"num_gangs": 2, "service": "lost", "idle_release_s": 1.0}
    with gangs(slow(0.02), **shared) as one, gangs(slow(0.02), **shared) as other:
        runs = [Run(one, wanted[:50]), Run(other, wanted[50:])]
        wait_until(lambda: os.kill(service_pid(one), signal.SIGKILL) is None, "the service is killed")
        assert_scores(runs[0].result(), wanted[:50])
        assert_scores(runs[1].result(), wanted[50:])
        assert service_pid(one) == service_pid(other)


DRIVER = """
import functools, ray
from moe_evo.gangs import ray_pool
from moe_evo.gangs.service_spec import ServiceSpec
from request_runs import complete, gangs, requests
from stand_ins import slow

ray_pool.ServiceSpec = functools.partial(ServiceSpec, lease_s=1.5)
ray.init(namespace="moe_evo", log_to_driver=False)
with gangs(slow(0.02), num_gangs=2, service="lease", idle_release_s=1.0) as pool:
    complete(pool, requests(2000, seed=5), lambda progress: print(progress.done, flush=True))
"""


def test_gangs_outlive_the_run_that_started_their_service_and_forget_it_when_it_is_killed(cluster: Cluster) -> None:
    wanted = requests(300)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "RAY_ADDRESS": cluster.address}
    with subprocess.Popen([sys.executable, "-c", DRIVER], env=environment, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert int(driver.stdout.readline()) >= 0  # the service is there
        end_driver = Once(lambda progress: progress.done > 20, lambda progress: driver.kill())
        # its successor is built though the job that all gangs began in is over
        end_rank = Once(
            lambda progress: end_driver.happened and progress.status.runs == 1,
            lambda progress: os.kill(progress.pids()[0], signal.SIGKILL),
        )

        def react(progress: Progress) -> None:
            end_driver(progress)
            end_rank(progress)

        try:
            with gangs(slow(0.02), num_gangs=2, service="lease", idle_release_s=1.0) as pool:
                progress = complete(pool, wanted, react)
        finally:
            driver.kill()
    assert end_rank.happened
    assert_scores(progress, wanted)
    assert progress.status.restarts == 1


def test_gangs_of_the_cluster_that_this_process_is_in_are_used_and_the_connection_is_left() -> None:
    with connected("auto"), connected("local"):
        pass
    assert ray.is_initialized()


def test_a_gang_that_is_too_large_for_this_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a gang needs 1 x \(CPU 1000\), PACK, this machine has CPU 16") as error:
        gangs(resources={"CPU": 1000}).__enter__()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"labels": {"a b": "x!"}}, {"resources": {"CPU": 1, "GPU": 1.5}}])
def test_what_ray_refuses_is_wrong_input_in_one_line(options: dict[str, dict[str, float | str]]) -> None:
    refused = pytest.raises(ConfigError, match=r"cluster\.resources or cluster\.labels: Ray refuses them")
    with gangs(address="auto", **options) as pool, refused as error:
        complete(pool, requests(2))
    assert "\n" not in str(error.value)


def test_what_a_service_does_is_visible_to_prometheus(cluster: Cluster) -> None:
    with gangs(num_gangs=2, service="metrics", idle_release_s=1.0) as pool:
        complete(pool, requests(8))
        node = next(node for node in ray.nodes() if node["Alive"])
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

        def numbers() -> dict[str, float]:
            with urllib.request.urlopen(address, timeout=5.0) as page:
                lines = page.read().decode().splitlines()
            found = [line.rpartition(" ") for line in lines if "moe_evo" in line and 'service="metrics"' in line]
            return {name.partition("{")[0]: float(value) for name, _, value in found}

        wait_until(lambda: numbers().get("ray_moe_evo_evaluations_total") == 8.0, "the counter says 8", 25.0)
        assert numbers().keys() >= {"ray_moe_evo_gangs", "ray_moe_evo_waiting", "ray_moe_evo_under_way"}


NO_CLUSTER = """
import functools, sys
from ray._private import services
services.find_gcs_addresses = functools.cache(lambda: set())  # as if nobody's Ray were running on this machine
from moe_evo.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("words", [["evaluate", "--genome", "full"], ["search", "--folder", "{run}"]])
def test_a_cluster_that_is_not_there_is_one_line_and_exit_code_3(words: list[str], tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    run = tmp_path / "runs" / "new"
    command = [sys.executable, "-c", NO_CLUSTER, *words, "--cluster.address", "auto"]
    done = subprocess.run(
        [word.format(run=run) for word in command],
        env=environment | {"RAY_TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("moe-evo: error: cluster.address: no Ray cluster at 'auto'")
    assert not run.exists(), "a run that never began leaves no folder"
    assert "Traceback" not in done.stderr


def test_a_gang_that_reads_other_tokens_than_the_driver_is_refused_in_one_line() -> None:
    with gangs(Rank, tokens={"syll": "other tokens"}, num_gangs=1) as pool, pytest.raises(TaskError) as caught:
        complete(pool, requests(1))
    assert "\n" not in str(caught.value)
    assert "task syll on" in str(caught.value) and "other tokens than where the run was started" in str(caught.value)


def test_a_gang_that_reads_the_drivers_tokens_serves() -> None:
    task = build_task(check_tasks([TASK])[0], ModelSource(MODEL).tokenizer, 8192)
    with gangs(Rank, tokens={"syll": task.digest}, num_gangs=1) as pool:
        assert complete(pool, requests(1)).done == 1

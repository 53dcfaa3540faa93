"""Nodes that join and leave while gangs serve, and gangs that are released when nothing is left to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.cluster_utils import Cluster
from request_runs import Once, Progress, assert_scores, complete, gangs, requests
from stand_ins import slow

from moe_evo.evaluation.pool import PoolStatus

# a resource of these tests alone keeps their gangs off the head
GANG = {"resources": {"gang_slot": 1.0}, "max_batch": 2, "deadline_s": 5.0}


def add_node(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=1, resources={"gang_slot": 1.0}, wait=False)


def num_serving(status: PoolStatus) -> int:
    return sum(gang.state in ("ready", "busy") for gang in status.gangs)


def serving(number: int) -> Callable[[Progress], bool]:
    return lambda progress: num_serving(progress.status) == number


def test_auto_grows_onto_a_node_that_joins_and_lets_one_go_that_leaves(cluster: Cluster) -> None:
    first, second = add_node(cluster), add_node(cluster)
    wanted = requests(900)
    leave = Once(
        lambda progress: num_serving(progress.status) == 2,
        lambda progress: cluster.remove_node(first, allow_graceful=False),
    )
    seen: list[int] = []

    def react(progress: Progress) -> None:
        leave(progress)
        seen.append(num_serving(progress.status))

    kinds: list[str] = []
    with gangs(slow(0.02), num_gangs="auto", idle_release_s=1.0, **GANG) as pool:
        while "broken" not in kinds:
            chunk, wanted = wanted[:30], wanted[30:]
            progress = complete(pool, chunk, react)
            assert_scores(progress, chunk)
            kinds += progress.kinds()
        progress = complete(pool, wanted[:30])
        assert_scores(progress, wanted[:30])
    cluster.remove_node(second)
    assert num_serving(progress.status) == 1
    assert max(seen) == 2


def test_an_evaluation_whose_nodes_are_lost_again_and_again_is_not_given_up(cluster: Cluster) -> None:
    (wanted,) = requests(1, seed=7)
    lost: list[int] = []
    nodes = [add_node(cluster)]

    def react(progress: Progress) -> None:
        pids = [gang.pids[0] for gang in progress.status.gangs if gang.state == "busy"]
        if pids and pids[0] not in lost and len(lost) < 3:
            lost.append(pids[0])
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            nodes.append(add_node(cluster))

    with gangs(slow(4.0), num_gangs=1, max_attempts=2, resources={"gang_slot": 1.0}) as pool:
        progress = complete(pool, [wanted], react)
    cluster.remove_node(nodes.pop())
    assert len(lost) == 3
    assert_scores(progress, [wanted])
    assert [one.detail for one in progress.events if one.kind == "broken"] == ["node 127.0.0.1 was lost"] * 3


def test_auto_releases_gangs_that_a_few_requests_do_not_need_and_builds_them_again() -> None:
    with gangs(slow(0.02), num_gangs="auto", idle_release_s=1.0, max_batch=1, resources={"CPU": 8.0}) as pool:

        def feed(at_a_time: int, seed: int, until: Callable[[Progress], bool]) -> None:
            """Send requests, so many at a time, until this holds."""
            wanted = requests(900, seed=seed)
            while not until(complete(pool, wanted[:at_a_time])):
                wanted = wanted[at_a_time:]

        feed(30, 1, serving(2))
        feed(1, 2, lambda progress: "released" in progress.kinds())
        feed(1, 3, serving(1))
        feed(30, 4, serving(2))

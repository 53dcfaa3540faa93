"""How many gangs fit on a cluster: arithmetic on the resources of its nodes, without a connection to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from moe_evo.config.cluster import PlacementStrategy


@dataclass(frozen=True)
class NodeCapacity:
    """A node of a cluster: its resources in total and free now, and its labels."""

    name: str
    total: Mapping[str, float]
    available: Mapping[str, float]
    labels: Mapping[str, str]


@dataclass(frozen=True)
class ClusterCapacity:
    """The nodes of a cluster, and the resources of one rank (`rank_bundle`).

    can_grow: whether the cluster may add nodes for a gang that does not fit now.
    """

    nodes: tuple[NodeCapacity, ...]
    bundle: Mapping[str, float]
    can_grow: bool = False


def gangs_that_fit(
    nodes: Sequence[NodeCapacity],
    bundle: Mapping[str, float],
    gang_size: int,
    strategy: PlacementStrategy,
    labels: Mapping[str, str],
    *,
    of: Literal["available", "total"] = "available",
) -> int:
    """How many gangs of `gang_size` ranks, with resources `bundle` each, fit on these nodes at the same time.

    strategy: STRICT_PACK wants a gang on one node, STRICT_SPREAD each rank on another; PACK and SPREAD
    only prefer so. labels: what a node's labels must be, with Ray's `!a`, `in(a,b)` and `!in(a,b)`.
    """
    fitting = (node for node in nodes if all(_matches(node.labels.get(key), want) for key, want in labels.items()))
    slots = [_slots(getattr(node, of), bundle) for node in fitting]
    if strategy == "STRICT_PACK":
        return sum(number // gang_size for number in slots)
    gangs = sum(slots) // gang_size
    if strategy == "STRICT_SPREAD":  # a node takes at most one rank of each gang
        while sum(min(number, gangs) for number in slots) < gangs * gang_size:
            gangs -= 1
    return gangs


def ranks_on_a_device(
    nodes: Sequence[Mapping[str, float]], bundle: Mapping[str, float], gang_size: int, num_gangs: int | Literal["auto"]
) -> int:
    """How many ranks with resources `bundle` may take memory side by side: from one GPU, or from one node without GPUs.

    nodes: all resources of each node. num_gangs: how many gangs of `gang_size` ranks there are at most.
    """
    if "GPU" in bundle:
        return max(int(1 / bundle["GPU"] + 1e-6), 1)
    fit = max(_slots(node, bundle) for node in nodes)
    return max(fit if num_gangs == "auto" else min(fit, num_gangs * gang_size), 1)


def _slots(resources: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """How many ranks a node holds; fractions of resources are compared with a small tolerance."""
    return min(int(resources.get(name, 0.0) / amount + 1e-6) for name, amount in bundle.items())


def _matches(label: str | None, want: str) -> bool:
    negated = want.startswith("!")
    want = want.removeprefix("!")
    values = want[3:-1].split(",") if want.startswith("in(") and want.endswith(")") else [want]
    return (label in [value.strip() for value in values]) != negated

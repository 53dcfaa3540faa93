"""How many gangs fit on a cluster, by arithmetic on its nodes; nothing here asks a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from moe_evo.config.cluster import PlacementStrategy


@dataclass(frozen=True)
class NodeCapacity:
    """A node of a cluster: its resources, whole and free now, and its labels."""

    name: str
    total: Mapping[str, float]
    available: Mapping[str, float]
    labels: Mapping[str, str]


@dataclass(frozen=True)
class ClusterCapacity:
    """The nodes on which gangs may stand, and the resources of one rank, as `rank_bundle` tells them.

    can_grow: whether nodes may be added for what does not fit now.
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
    """How many gangs of `gang_size` ranks, `bundle` each, stand on these nodes at the same time.

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


def _slots(resources: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """How many ranks a node holds; resources are fractions, so a hair too little is enough."""
    return min(int(resources.get(name, 0.0) / amount + 1e-6) for name, amount in bundle.items())


def _matches(label: str | None, want: str) -> bool:
    negated = want.startswith("!")
    want = want.removeprefix("!")
    values = want[3:-1].split(",") if want.startswith("in(") and want.endswith(")") else [want]
    return (label in [value.strip() for value in values]) != negated

"""The config of a cluster: where evaluations run, in gangs of which size, and when a gang counts as broken."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moe_evo.config.check import require, require_name
from moe_evo.config.model import ModelConfig

_LONGEST_S = 10**9  # what waits for events takes at most, about thirty years

PlacementStrategy = Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"]


@dataclass(frozen=True)
class ClusterConfig:
    """Where evaluations run: in this process, or on Ray gangs that each hold the model once.

    Args:
        address: Default: in this process, without Ray. 'local' starts a Ray of this command's own on this
            machine, 'auto' joins the Ray cluster that runs here (or that RAY_ADDRESS names), HOST:PORT
            joins that one.
        num_gangs: How many gangs, or 'auto': as many as fit and are needed, more when nodes join, fewer
            when nodes leave or a gang is idle for idle_release_s.
        gang_size: Ranks of a gang, one GPU each, that hold one model together (model.sharding says how);
            with device_map the GPUs of its one process.
        resources: Ray resources of one rank, as in {GPU: 1, CPU: 4}; default: one GPU where the cluster
            has any, else one CPU.
        labels: Ray node labels that a gang's nodes must have, as in {accelerator: h100}.
        strategy: Placement of a gang's ranks on nodes (Ray's placement group strategies).
        max_batch: Most genomes in one request; fewer are sent while evaluations are slow or few are left.
        deadline_s: Longest time for one evaluation, or for observing the experts on one task, before its gang counts
            as hung; default: any time, as long as a layer of the model is computed every half hour (once one
            evaluation on those examples is done: 20 times its time, one minute to half an hour).
        load_timeout_s: Longest time for a gang to load the model.
        max_attempts: A genome that broke so many gangs is given up (a lost node, or memory that ran out, is not its
            fault); the same number of failures to load in a row, with no success before, ends the run.
        idle_release_s: 'auto': a gang that is idle for so long is released; a shared service ends when it
            had no run for so long.
        service: Name of a service of gangs that several runs on one cluster share in fair turns, with
            their evaluations in one cache; default: gangs of this run alone.
    """

    address: str | None = None
    num_gangs: int | Literal["auto"] = "auto"
    gang_size: int = 1
    resources: dict[str, float] | None = None
    labels: dict[str, str] = field(default_factory=dict)
    strategy: PlacementStrategy = "PACK"
    max_batch: int = 16
    deadline_s: float | None = None
    load_timeout_s: float = 3600.0
    max_attempts: int = 3
    idle_release_s: float = 300.0
    service: str | None = None

    def __post_init__(self) -> None:
        for option in ("num_gangs", "gang_size", "max_batch", "max_attempts"):
            value = getattr(self, option)
            require(value == "auto" or value >= 1, f"cluster.{option}", value, "1 or more")
        for option in ("deadline_s", "load_timeout_s", "idle_release_s"):
            value = getattr(self, option)
            is_time = value is None or 0 < value <= _LONGEST_S
            require(is_time, f"cluster.{option}", value, f"seconds, more than 0 and at most {_LONGEST_S:,}")
        require(self.address != "", "cluster.address", self.address, "'local', 'auto' or HOST:PORT")
        amounts = self.resources
        require(
            amounts is None or (bool(amounts) and min(amounts.values()) > 0), "cluster.resources", amounts,
            "positive amounts, as in {GPU: 1, CPU: 4}",
        )  # fmt: skip
        require(self.service != "", "cluster.service", self.service, "a name")
        require_name("cluster.service", self.service or "")
        if self.address is None:
            defaults = ClusterConfig(address="auto")
            for option, value in vars(self).items():
                require(
                    option == "address" or value == getattr(defaults, option), f"cluster.{option}", value,
                    "none without cluster.address; add --cluster.address auto (or local)",
                )  # fmt: skip


def num_ranks(model: ModelConfig, cluster: ClusterConfig) -> int:
    """Processes that hold one model together; device_map has one, with gang_size devices."""
    return cluster.gang_size if model.sharding in ("tensor_parallel", "zero3") else 1

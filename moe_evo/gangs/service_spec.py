"""What a service of gangs is started with, and what it answers with. Plain values, sent between processes."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from moe_evo.config.cluster import ClusterConfig, num_ranks
from moe_evo.config.model import ModelConfig
from moe_evo.evaluation.pool import PoolNews
from moe_evo.gangs.dispatcher import Answer
from moe_evo.gangs.rank import Rank


@dataclass(frozen=True)
class ServiceSpec:
    """What a service serves, and where.

    bundle: Ray resources of one rank. lease_s: a run that has not asked for news for so long counts as dead.
    longest_silence_s: a gang that makes no progress for so long counts as hung, where the config has no deadline.
    name: the names of its gangs begin so.
    """

    model: ModelConfig
    model_hash: str
    cluster: ClusterConfig
    bundle: dict[str, float]
    rank: type[Rank] = Rank
    lease_s: float = 120.0
    longest_silence_s: float = 1800.0
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def ranks(self) -> int:
        return num_ranks(self.model, self.cluster)

    @property
    def needs(self) -> str:
        """What a gang asks the cluster for, in words."""
        amounts = ", ".join(f"{name} {amount:g}" for name, amount in self.bundle.items())
        labels = f" on nodes with {self.cluster.labels}" if self.cluster.labels else ""
        return f"{self.ranks} x ({amounts}){labels}, {self.cluster.strategy}"


@dataclass(frozen=True)
class News:
    """What `exchange` returns to a run.

    known: False where the service has never heard of the run, or has forgotten it. slots: how many
    jobs the run may have submitted at a time. fatal: why no gang can ever serve, if that is so.
    """

    known: bool = True
    answers: Sequence[tuple[int, Answer]] = ()
    slots: int = 0
    pool: PoolNews = field(default_factory=PoolNews)
    fatal: Exception | None = None

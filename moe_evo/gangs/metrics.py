"""What gangs do, as Ray metrics: on Ray's dashboard, and for Prometheus to collect."""

from __future__ import annotations

from collections import Counter as Tally
from typing import get_args

from ray.util.metrics import Counter, Gauge

from moe_evo.evaluation.pool import GangState, PoolStatus


class PoolMetrics:
    """The numbers of `PoolStatus`, with the service's name as tag."""

    def __init__(self, service: str) -> None:
        self._tags = {"service": service}
        keys = tuple(self._tags)
        self._gangs = Gauge("moe_evo_gangs", "Gangs by state", tag_keys=("service", "state"))
        self._waiting = Gauge("moe_evo_waiting", "Evaluations that no gang has taken", tag_keys=keys)
        self._under_way = Gauge("moe_evo_under_way", "Evaluations that a gang has taken", tag_keys=keys)
        self._totals = {
            "evaluations": Counter("moe_evo_evaluations", "Finished evaluations", tag_keys=keys),
            "failures": Counter("moe_evo_failures", "Evaluations that gave no fitness", tag_keys=keys),
            "restarts": Counter("moe_evo_restarts", "Gangs that were built anew", tag_keys=keys),
        }
        self._before = PoolStatus()

    def tell(self, status: PoolStatus) -> None:
        states = Tally(gang.state for gang in status.gangs)
        for state in get_args(GangState):
            self._gangs.set(states[state], {**self._tags, "state": state})
        self._waiting.set(status.waiting, self._tags)
        self._under_way.set(status.under_way, self._tags)
        for name, counter in self._totals.items():
            more = getattr(status, name) - getattr(self._before, name)
            if more > 0:
                counter.inc(more, self._tags)
        self._before = status

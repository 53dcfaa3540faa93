"""`RayPool`: the pool of a run on a cluster. It sends requests to a `GangService` and collects the outcomes."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import count
from types import MappingProxyType
from typing import Any

from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from moe_evo.config.evaluation import SPEED_ONLY, EvaluationConfig
from moe_evo.config.run import ScoringConfig
from moe_evo.criteria.questions import Answers, Question
from moe_evo.criteria.sums import Observation
from moe_evo.errors import ClusterError, ConfigError
from moe_evo.evaluation.pool import Listener, Request
from moe_evo.gangs.capacity import ClusterCapacity, gangs_that_fit
from moe_evo.gangs.connection import cluster_capacity, connected, end_service, rank_bundle, reason, start_service
from moe_evo.gangs.dispatcher import Answer, Job
from moe_evo.gangs.head import answer_of, head_answers
from moe_evo.gangs.rank import Rank, Work
from moe_evo.gangs.ray_border import ActorHandle, ray
from moe_evo.gangs.service_spec import News, ServiceSpec
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation, EvaluationFailure, Outcome
from moe_evo.genomes.space import ModelShape
from moe_evo.plugins import registering_modules
from moe_evo.tasks.answered import Answered
from moe_evo.tasks.data import TaskData

_NEWS_S = 1.0
_SILENCE_S = 60.0
_MOST_SERVICES = 3


@contextmanager
def ray_pool(
    config: ScoringConfig,
    data: Sequence[TaskData],
    shape: ModelShape,
    model_hash: str,
    rank: type[Rank] = Rank,
    *,
    tokens: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[RayPool]:
    """A pool of gangs on the cluster that `config` names, until the block is left.

    shape, model_hash: of the model, as the run knows them. tokens: see `Work`. Raises ClusterError.
    """
    address = config.cluster.address
    assert address is not None, "a config without cluster.address is evaluated in this process"
    with connected(address):
        spec = ServiceSpec(config.model, model_hash, config.cluster, rank_bundle(config.model, config.cluster), rank)
        if address == "local":
            _check_capacity(spec, cluster_capacity(config.model, config.cluster))
        pool = RayPool(lambda: start_service(spec), work_of(data, config.evaluation, tokens), shape)
        try:
            yield pool
        finally:
            if head_answers():  # without a head, these would wait until Ray ends this process
                pool.close()
                if config.cluster.service is None:
                    end_service(pool.service, spec)


def work_of(
    data: Sequence[TaskData], evaluation: EvaluationConfig, tokens: Mapping[str, str] = MappingProxyType({})
) -> Work:
    """The work of a run; runs whose scores on one model would be equal have equal keys."""
    scoring = {name: value for name, value in asdict(evaluation).items() if name not in SPEED_ONLY}
    tasks = [[one.name, one.kind, one.metric, one.hash, asdict(one.config)] for one in data]
    key = hashlib.sha256(json.dumps([scoring, tasks, dict(tokens)]).encode()).hexdigest()
    return Work(key, tuple(data), evaluation, registering_modules(), dict(tokens))


def _check_capacity(spec: ServiceSpec, capacity: ClusterCapacity) -> None:
    """Raise ConfigError where no gang can ever fit: it would wait for ever."""
    cluster = spec.cluster
    if not gangs_that_fit(capacity.nodes, spec.bundle, spec.ranks, cluster.strategy, cluster.labels, of="total"):
        total = ", ".join(f"{name} {capacity.nodes[0].total.get(name, 0):g}" for name in spec.bundle)
        raise ConfigError(
            f"cluster: a gang needs {spec.needs}, this machine has {total}; lower cluster.gang_size or "
            "cluster.resources, and check cluster.labels"
        )


class RayPool:
    """Requests of one run to a service of gangs.

    start: starts the service or finds it. When the service is lost, it is called again and all requests that are under
    way are submitted again.
    """

    def __init__(self, start: Callable[[], ActorHandle], work: Work, shape: ModelShape) -> None:
        self.listener: Listener = lambda news: None
        self._start = start
        self._work = work
        self._shape = shape
        self._name = uuid.uuid4().hex
        self._numbers = count()
        self._jobs: dict[int, Job] = {}
        self._requests: dict[int, Request] = {}
        self._unsent: list[int] = []
        self._slots = 1
        self._lost = 0
        self._joined = False
        self.service = start()

    @property
    def shape(self) -> ModelShape:
        return self._shape

    @property
    def free_slots(self) -> int:
        return max(self._slots - len(self._jobs), 0)

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            number = self._add(Job(self._work.key, request.split, request.genome, request.rival))
            self._requests[number] = request

    def next_outcomes(self) -> list[tuple[Request, Outcome]]:
        assert self._requests, "next_outcomes was called with no request under way"
        outcomes = []
        for number, answer in self._next_answers():
            assert isinstance(answer, Evaluation | EvaluationFailure)
            outcomes.append((self._requests.pop(number), answer))
        return outcomes

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Observation[Any]]]:
        """See `Pool`; raises ClusterError where a question breaks every gang."""
        assert not self._requests, "ask before or after evaluations, not among them"
        asked = {self._add(Job(self._work.key, question=question)): question for question in questions}
        while asked:
            for number, answer in self._next_answers():
                if isinstance(answer, EvaluationFailure):
                    raise ClusterError(f"the experts could not be observed: {answer.reason}")
                assert isinstance(answer, Observation)
                yield asked.pop(number), answer

    def answered(self, genome: Genome | None, split: str, first: int | None = None) -> tuple[Answered, ...]:
        """See `Pool`; raises ClusterError where the question breaks every gang."""
        assert not self._requests, "ask before or after evaluations, not among them"
        self._add(Job(self._work.key, question=Answers(genome=genome, split=split, first=first)))
        ((_, answer),) = self._next_answers()
        if isinstance(answer, EvaluationFailure):
            raise ClusterError(f"no answers: {answer.reason}")
        assert isinstance(answer, tuple)
        return answer

    def close(self) -> None:
        """Leave the service."""
        with suppress(RayError):  # a service that is gone needs no farewell
            ray.get(self.service.leave.remote(self._name), timeout=_SILENCE_S)

    def _add(self, job: Job) -> int:
        number = next(self._numbers)
        self._jobs[number] = job
        self._unsent.append(number)
        return number

    def _next_answers(self) -> Sequence[tuple[int, Answer]]:
        """Wait for at least one answer; tell the listener what happens meanwhile."""
        while True:
            try:
                news = self._exchange()
            except (RayActorError, GetTimeoutError, OutOfMemoryError) as error:
                self._start_again(error)
                continue
            except RayTaskError:
                raise
            except RayError as error:
                raise ClusterError(
                    f"the Ray cluster is gone ({reason(error)}); run the same command again, on any cluster: it goes "
                    "on where it stood"
                ) from error
            if not news.known:
                self._joined = False
                continue
            self._slots = news.slots
            self.listener(news.pool)
            if news.answers:
                self._lost = 0
                for number, _ in news.answers:
                    del self._jobs[number]
                return news.answers
            if news.fatal is not None:
                raise news.fatal

    def _exchange(self) -> News:
        """Send new requests and fetch news."""
        if not self._joined:
            answer_of(self.service.join.remote(self._name, self._work), _SILENCE_S)
            self._joined, self._unsent = True, list(self._jobs)
        jobs = [(number, self._jobs[number]) for number in self._unsent]
        news: News = answer_of(self.service.exchange.remote(self._name, jobs, _NEWS_S), _SILENCE_S)
        self._unsent.clear()
        return news

    def _start_again(self, error: Exception) -> None:
        """Find or start another service after one was lost."""
        self._lost += 1
        if self._lost >= _MOST_SERVICES:
            raise ClusterError(
                f"the service of gangs was lost {self._lost} times in a row ({type(error).__name__}); look at the "
                "Ray cluster, then run the same command again: it goes on where it stood"
            ) from error
        if isinstance(error, GetTimeoutError):
            ray.kill(self.service)  # it hangs, and would keep its name and its gangs
        self.service, self._joined = self._start(), False

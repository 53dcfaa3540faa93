"""The loop of a run: ask the search, journal the candidates, submit, collect, journal the outcomes, tell the search.

An outcome is in the journal before the search gets it. So if this process dies, the next one continues
from the journal and nothing is lost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from moe_evo.criteria.observer import Observer
from moe_evo.criteria.registry import METHODS
from moe_evo.evaluation.fresh_examples import FreshExamples
from moe_evo.evaluation.pool import Pool, PoolNews, Request
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Candidate, Evaluation, ExampleScores, Individual, Outcome, Population
from moe_evo.genomes.space import SearchSpace
from moe_evo.records.journal import REFERENCE, Journal
from moe_evo.searches.base import Search
from moe_evo.tasks.samples import Sample
from moe_evo.tracking.base import Tracker

_STATUS_INTERVAL_S = 5.0
_SURVIVORS = 6
FULL = "full"


class Run:
    """Evaluates candidates of one run on a pool and writes the outcomes into its journal.

    Every genome, told by its digest, is evaluated once on a split. races: the evaluation of a candidate may stop
    before the last example, once it is surely worse than the best ones. fresh: where it is set, candidates of a search
    are scored on samples of the search split.
    """

    def __init__(self, journal: Journal, pool: Pool, tracker: Tracker, *, races: bool = False) -> None:
        self.fresh: FreshExamples | None = None
        self._races = races
        self._journal = journal
        self._pool = pool
        self._tracker = tracker
        # where the outcome of a genome on a split is in the journal: itself it would be in memory twice
        self._known = {(digest, split): (search, number) for digest, split, search, number in journal.finished()}
        self._status_at = -math.inf
        pool.listener = self._hear

    def evolve(self, name: str, title: str, search: Search, evaluations: int) -> Population:
        """Run `search` until `evaluations` candidates are evaluated or it finds nothing new."""
        asked = self._journal.candidates(name)
        by_number = {one.number: one for one in asked}
        finished = [Individual(by_number[number], outcome) for number, outcome in self._journal.told(name).items()]
        search.restore(asked)
        search.tell(finished)
        done = {one.number for one in finished}
        self._tracker.stage(title, evaluations, done=len(finished), pace_s=self._journal.pace_s(name))
        waiting = self._begin(name, search, [one for one in asked if one.number not in done])
        num_asked = len(asked)
        while True:
            wanted = min(self._pool.free_slots, evaluations - num_asked)
            candidates = search.ask(wanted) if wanted > 0 else []
            self._journal.propose(name, candidates)
            num_asked += len(candidates)
            waiting |= self._begin(name, search, candidates)
            if waiting:
                finished = [Individual(waiting.pop(request.number), outcome) for request, outcome in self._collect()]
                self._tell(name, search, finished)
            elif not candidates:
                return search.population

    def _begin(self, name: str, search: Search, candidates: Iterable[Candidate]) -> dict[int, Candidate]:
        """Submit candidates and return them by number; those whose genome was evaluated already are told at once."""
        waiting, finished = {}, []
        for candidate in candidates:
            outcome = self._known_outcome(candidate.genome, self._examples(candidate))
            if outcome is None:
                waiting[candidate.number] = candidate
            else:
                finished.append(Individual(candidate, outcome))
        if finished:
            rows = [(name, one.number, self._examples(one.candidate), one.outcome) for one in finished]
            self._journal.record(rows)
            self._tell(name, search, finished)
        rival = self._rival(search.population)
        for candidate in waiting.values():
            self._submit(name, self._examples(candidate), [candidate], rival)
        return waiting

    def _examples(self, candidate: Candidate) -> str:
        """The examples on which a search's candidate is scored: the search split, or the name of a sample of it."""
        return "search" if self.fresh is None else str(self.fresh.sample(candidate.number))

    def _rival(self, population: Population) -> ExampleScores | None:
        """Scores of the worst of the best few, which a candidate has to beat; None while there are too few."""
        complete = population.complete.ranked if self._races else ()
        return complete[_SURVIVORS - 1].evaluation.scores if len(complete) >= _SURVIVORS else None

    def score(self, title: str, entries: Sequence[tuple[str, Candidate]], split: str) -> list[Individual]:
        """Evaluate candidates, each given with the name of its search, on `split`; returns them in the given order.

        split: one of `SCORINGS`, or the name of a sample of it.
        title: heading of the stage that the tracker shows; '' where the stage has begun.
        """
        outcomes = {
            (name, number): outcome
            for name in {name for name, _ in entries}
            for number, outcome in self._journal.outcomes(name, split).items()
        }
        missing = {(name, one.number): one for name, one in entries if (name, one.number) not in outcomes}
        if title:
            self.stage(title, len(missing))
        submitted = set()
        for (name, _), candidate in missing.items():
            digest = candidate.genome.digest
            if (digest, split) not in self._known and digest not in submitted:
                submitted.add(digest)
                self._submit(name, split, [candidate])
        num_left = len(submitted)
        while num_left:
            for request, outcome in self._collect():
                num_left -= 1
                key = (request.search, request.number)
                outcomes[key] = outcome
                self._score_told(request.search, split, Individual(missing.pop(key), outcome))
        known = {key: self._known_outcome(one.genome, split) for key, one in missing.items()}
        twins = {key: outcome for key, outcome in known.items() if outcome is not None}
        if twins:  # an equal genome was evaluated before, or just now
            self._journal.record([(*key, split, outcome) for key, outcome in twins.items()])
        for key, candidate in missing.items():
            self._score_told(key[0], split, Individual(candidate, twins[key]))
        outcomes |= twins
        return [Individual(one, outcomes[name, one.number]) for name, one in entries]

    def stage(self, title: str, total: int) -> None:
        """Show that a stage of `total` evaluations begins; shows nothing for 0."""
        if total:
            self._tracker.stage(title, total)

    def _score_told(self, name: str, split: str, individual: Individual) -> None:
        if Sample.read(split) is None:
            self._tracker.recorded(name, split, individual)
        self._tracker.evaluated(individual, None, "")

    def references(self, space: SearchSpace, observer: Observer, methods: Sequence[str]) -> dict[str, Candidate]:
        """The full model, and the genomes of one-shot methods, by name."""
        known = {one.operator: one for one in self._journal.candidates(REFERENCE)}
        for name in [FULL, *(methods if space.can_prune else ())]:
            if name not in known:
                genome = space.shape.identity() if name == FULL else METHODS[name].genome(observer, space)
                known[name] = self.refer(genome, name)
        return known

    def refer(self, genome: Genome, made_by: str) -> Candidate:
        """The candidate for a genome that no search proposed; the same candidate at every call."""
        known = self._journal.candidates(REFERENCE)
        same = (one for one in known if (one.genome, one.operator) == (genome, made_by))
        candidate = next(same, Candidate(len(known), genome, made_by))
        if candidate.number == len(known):
            self._journal.propose(REFERENCE, [candidate])
        return candidate

    def _submit(
        self, name: str, split: str, candidates: Iterable[Candidate], rival: ExampleScores | None = None
    ) -> None:
        self._pool.submit([Request(name, one.number, one.genome, split, rival) for one in candidates])

    def _collect(self) -> list[tuple[Request, Outcome]]:
        """Wait for outcomes, and write them into the journal before they are returned."""
        finished = [(request, self._corrected(request, one)) for request, one in self._pool.next_outcomes()]
        self._journal.record([(request.search, request.number, request.split, one) for request, one in finished])
        for request, outcome in finished:
            # for equal genomes; an evaluation that was stopped early is an estimate, and the candidate's own
            if not (isinstance(outcome, Evaluation) and outcome.is_stopped):
                self._known[request.genome.digest, request.split] = (request.search, request.number)
        return finished

    def _known_outcome(self, genome: Genome, split: str) -> Outcome | None:
        """The outcome of an equal genome that was evaluated on this split before."""
        where = self._known.get((genome.digest, split))
        return None if where is None else self._journal.outcome(*where, split)

    def _corrected(self, request: Request, outcome: Outcome) -> Outcome:
        sample = Sample.read(request.split)
        if self.fresh is None or sample is None or sample.scoring != "search":
            return outcome
        return self.fresh.corrected(outcome, sample)

    def _tell(self, name: str, search: Search, individuals: Sequence[Individual]) -> None:
        search.tell(individuals)
        best = search.population.best if len(search.population) else None
        for individual in individuals:
            self._tracker.recorded(name, "search", individual)
            self._tracker.evaluated(individual, best, search.phase)

    def _hear(self, news: PoolNews) -> None:
        """Write what happens to gangs into the journal, and show it."""
        now = time.monotonic()
        if news.events or (news.status.gangs and now - self._status_at > _STATUS_INTERVAL_S):
            self._status_at = now
            events = [(one.at, one.gang, one.kind, one.detail) for one in news.events]
            self._journal.record_pool(events, asdict(news.status))
        self._tracker.pool(news)

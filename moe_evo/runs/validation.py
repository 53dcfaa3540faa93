"""Chooses the winner of a search: its finalists are scored on the validation split, fewer of them on more examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_evo.config.run import RunConfig
from moe_evo.errors import RunError
from moe_evo.genomes.population import Evaluation, Individual, Population
from moe_evo.genomes.space import SearchSpace
from moe_evo.runs.finalists import Judged, better_half, finalists, judge, put_together
from moe_evo.runs.halving import num_parts, part_size
from moe_evo.runs.loop import Run
from moe_evo.searches.scored import expected_scores
from moe_evo.tasks.data import TaskData
from moe_evo.tasks.samples import Sample


class Validation:
    """The choice of winners of one run, the same for every search in it.

    Sequential halving (Karnin et al. 2013, Almost optimal exploration in multi-armed bandits): all finalists are scored
    on a quarter of the validation split, the better half of them on another quarter, and the better half of those on
    the whole split.
    """

    def __init__(self, run: Run, config: RunConfig, space: SearchSpace, data: Sequence[TaskData]) -> None:
        self._run = run
        self._rule = config.evaluation.fitness
        self._num_finalists = config.selection.finalists
        self._num_recovered = config.selection.recover_finalists
        self._space = space
        self._sizes = [len(task.splits["validation"]) for task in data]

    def judged(self, search: str, title: str, population: Population) -> list[Judged]:
        """The finalists of a search that saw the whole split, with their outcomes there, best first; at least one."""
        if not len(population):
            raise RunError(f"{title}: every evaluation failed; the reasons are in the journal, see moe-evo show")
        expected = expected_scores(self._space, population)
        left = finalists(population, expected, self._num_finalists)
        seen: dict[int, list[Evaluation]] = {one.number: [] for one in left}
        for part in range(num_parts(len(left), self._sizes)):
            sample = Sample("validation", part_size(self._sizes), part)
            scored = self._scored(search, f"validation, part {part + 1}: {title}", left, str(sample))
            for one in scored:
                seen[one.number].append(one.evaluation)
            ranked = [one.individual for one in self._judged(scored, expected, seen)]
            left = better_half(ranked, max(self._num_recovered, 1))
        scored = self._scored(search, f"validation: {title}", left, "validation")
        if not scored:
            raise RunError(f"{title}: no finalist could be scored on the validation split")
        return self._judged(scored, expected, {one.number: [one.evaluation] for one in scored})

    def _scored(self, search: str, title: str, individuals: Sequence[Individual], split: str) -> list[Individual]:
        """The individuals with their outcomes on `split`, those that did not fail."""
        scored = self._run.score(title, [(search, one.candidate) for one in individuals], split)
        return [one for one in scored if isinstance(one.outcome, Evaluation)]

    def _judged(
        self, scored: Sequence[Individual], expected: Mapping[int, float], seen: Mapping[int, Sequence[Evaluation]]
    ) -> list[Judged]:
        scores = [put_together(seen[one.number]) for one in scored]
        return judge(scored, [expected[one.number] for one in scored], scores, self._rule) if scored else []

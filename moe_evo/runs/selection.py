"""A run from its config to its final table: search, choose on the validation split, report on the test split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.run import RunConfig
from moe_evo.config.task import SPLITS
from moe_evo.criteria.observer import Observer
from moe_evo.criteria.registry import METHODS, criteria_of
from moe_evo.errors import ModelError
from moe_evo.evaluation.fresh_examples import FreshExamples
from moe_evo.evaluation.pool import Pool
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Candidate, Evaluation, EvaluationFailure, Individual, Population
from moe_evo.genomes.soup import alike, greedy_soup
from moe_evo.genomes.space import SearchSpace
from moe_evo.records.journal import MAIN, RANDOM, REFERENCE, Journal
from moe_evo.records.result import FinalistRecoveries, Score, TableRow
from moe_evo.runs.early_warnings import full_model_warnings
from moe_evo.runs.finalist_recovery import FinalistRecovery
from moe_evo.runs.finalists import Judged
from moe_evo.runs.loop import FULL, Run
from moe_evo.runs.recovery_cost import without_recovery
from moe_evo.runs.validation import Validation
from moe_evo.searches.base import Phase
from moe_evo.searches.random_search import RandomSearch
from moe_evo.searches.registry import build_search, planned_phases
from moe_evo.tasks.data import TaskData, is_share, reported
from moe_evo.tracking.base import Tracker


@dataclass(frozen=True)
class Contender:
    """An individual that gets a row in the final table, and the number of evaluations spent to find it."""

    search: str
    key: str
    title: str
    candidate: Candidate
    evaluations: int = 0


@dataclass(frozen=True)
class Chosen:
    """rows: the final table, the winner last. expected: what the winner can be expected to score on new examples.

    finalists: that were recovered before the winner was chosen.
    """

    rows: list[TableRow]
    expected: float
    finalists: FinalistRecoveries | None = None


def run_search(
    config: RunConfig,
    space: SearchSpace,
    journal: Journal,
    pool: Pool,
    tracker: Tracker,
    *,
    data: Sequence[TaskData],
    observer: Observer,
    wider: Sequence[Genome] = (),
    recovery: FinalistRecovery | None = None,
) -> Chosen:
    """Search, choose on the validation split, report on the test split.

    data: of the pool's tasks. observer: computes what one-shot methods need to know of the pool's model on them.
    wider: see `build_search`. recovery: of finalists before the winner is chosen, which takes a part of the budget.
    """
    assert pool.shape == space.shape, "the pool serves another model than the space was built for"
    run = Run(journal, pool, tracker, races=config.evaluation.race is not None)
    baselines, seeds = config.selection.baselines, config.search.init_methods
    references = run.references(space, observer, [*baselines, *seeds])
    (full,) = run.score("full model", [(REFERENCE, references[FULL])], "search")
    _require_success(full)
    for line in full_model_warnings(data, full.evaluation, full.genome, pool):
        tracker.message(line)
    run.fresh = _fresh_examples(config, data, full)
    genomes = {name: references[name].genome for name in seeds if name in references}
    for name, genome in genomes.items():
        assert space.genome(space.genes(genome)) == genome, f"{name} makes no genome of this search"
    criteria = criteria_of("search.surrogate.priors", config.search.priors if space.can_prune else [])
    priors = {name: one.scores(observer) for name, one in criteria.items()}
    searched = without_recovery(config.search, 0 if recovery is None else recovery.cost)
    search = build_search(space, searched, wider, genomes, priors)
    population = run.evolve(MAIN, f"search ({searched.algorithm})", search, searched.evaluations)
    contenders = [
        Contender(REFERENCE, name, "full model" if name == FULL else METHODS[name].title, references[name])
        for name in (FULL, *baselines)
        if name in references
    ]
    validation = Validation(run, config, space, data)
    if config.selection.random_search and config.search.algorithm != "random":
        search = RandomSearch(space, config.search)
        random = run.evolve(RANDOM, "random search", search, config.search.evaluations)
        (drawn,) = RandomSearch.phases(config.search, can_prune=space.can_prune)
        title = drawn.row_title(len(random))
        best = validation.judged(RANDOM, title, random)[0]
        contenders.append(Contender(RANDOM, "random_search", title, best.individual.candidate, len(random)))
    phases = planned_phases(searched, can_prune=space.can_prune)
    judged = validation.judged(MAIN, phases[-1].row_title(len(population)), population)
    if recovery is not None:
        judged = recovery.chosen(judged)
    finalists, cost = (None, 0) if recovery is None else (recovery.facts(judged), recovery.cost)
    winners = _winners(run, config, population, judged, phases)
    contenders += [replace(one, evaluations=one.evaluations + cost) for one in winners]
    return Chosen(_rows(run, contenders, data, config.evaluation), judged[0].score, finalists)


def _fresh_examples(config: RunConfig, data: Sequence[TaskData], full: Individual) -> FreshExamples | None:
    if not config.evaluation.is_fresh:
        return None
    examples, scores = {task.name: task.splits["search"] for task in data}, full.evaluation.scores
    assert scores is not None, "the full model has no rival"
    return FreshExamples(config.evaluation.sample_size, config.evaluation.fitness, examples, scores)


def _require_success(full: Individual) -> None:
    if isinstance(full.outcome, EvaluationFailure):
        raise ModelError(
            f"the full model has no fitness ({full.outcome.reason}); check the checkpoint, and try model.dtype float32"
        )


def _winners(
    run: Run, config: RunConfig, population: Population, judged: Sequence[Judged], phases: Sequence[Phase]
) -> list[Contender]:
    """The candidates for the winner, as rows of the final table; the best individual of all is the last one.

    Before it come the soup, if there is one, and the best pruning, where merges followed a phase that only prunes.
    """
    number, num_prunings = len(population), len(population.prunings)
    pruning = next((phase for phase in reversed(phases) if phase.only_prunes), None)
    merges = num_prunings < number
    contenders = []
    best_pruning = next((one for one in judged if one.individual.genome.is_pruning), None)
    if pruning is not None and merges and best_pruning is not None:
        title = pruning.row_title(num_prunings)
        contenders = [Contender(MAIN, "best_pruning", title, best_pruning.individual.candidate, num_prunings)]
    last = phases[-1] if pruning is None or merges else pruning
    contenders.append(Contender(MAIN, "best", last.row_title(number), judged[0].individual.candidate, number))
    return [*_soups(run, config, Population(tuple(one.individual for one in judged)), number), *contenders]


def _soups(run: Run, config: RunConfig, validated: Population, number: int) -> list[Contender]:
    """The soup (average) of the finalists, where the config asks for one and it beats each of them; else nothing."""
    if not config.selection.soup:
        return []

    run.stage("validation: soups", len(alike(validated)))

    def score(genome: Genome) -> Individual:
        return run.score("", [(REFERENCE, run.refer(genome, "soup"))], "validation")[0]

    soup, num_ingredients = greedy_soup(validated, score)
    title = f"soup of {num_ingredients}"
    return [Contender(REFERENCE, "soup", title, soup.candidate, number)] if num_ingredients > 1 else []


def _rows(
    run: Run, contenders: Sequence[Contender], data: Sequence[TaskData], evaluation: EvaluationConfig
) -> list[TableRow]:
    """The final table: every split's scores by the metrics that are reported."""
    entries = [(one.search, one.candidate) for one in contenders]
    scores: list[dict[str, Score]] = [{} for _ in contenders]
    for split in SPLITS:
        scored = run.score(f"{split} split, final table", entries, reported(split, data, is_fresh=evaluation.is_fresh))
        for found, individual in zip(scores, scored, strict=True):
            if isinstance(individual.outcome, Evaluation):
                found[split] = Score.of(individual.outcome, is_share=is_share(data), rule=evaluation.fitness)
    return [
        TableRow(one.key, one.title, one.candidate, one.evaluations, found)
        for one, found in zip(contenders, scores, strict=True)
    ]

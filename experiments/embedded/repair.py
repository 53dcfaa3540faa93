"""Does it pay to repair the best pruning with a few numbers, or are more prunings worth more?

    python experiments/embedded/repair.py

The last 40 of 200 evaluations go into one of: more prunings; free noise on both matrices (EEP's second phase); a scale
and a share of a dropped expert for each kept one, found by a Gaussian process. What each adds to the best pruning of
the first 160 is scored on test, example by example. Prints the table of README.md; about half an hour of one core.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import numpy as np
from repairs import Numbers, Repairs, searched
from rich.console import Console

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.search import SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.criteria.merges import logit_likeness
from moe_evo.criteria.observer import Observer
from moe_evo.criteria.questions import RouterLogits
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.evaluation.local_pool import LocalPool
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.operators import gaussian_mutation
from moe_evo.genomes.population import Evaluation, Individual, Population
from moe_evo.genomes.space import SearchSpace
from moe_evo.models.source import ModelSource
from moe_evo.runs.open_pool import load_evaluator
from moe_evo.searches.surrogate import SurrogateSearch
from moe_evo.tasks.data import check_tasks
from moe_evo.tracking.terminal import TerminalTracker

NUM_KEPT = {"embedded": (2, 4), "embedded-fine": (8, 16)}
EVALUATIONS, NUM_LAST, NUM_AVERAGED, NUM_FINALISTS = 200, 40, 10, 20
ARMS = ("more prunings", "free noise", "best repair", "mean of ten repairs")
CHOSEN = ("prunings, chosen", "with the mean, chosen")


def evaluator_of(model: str, task: str, tracker: TerminalTracker) -> Evaluator:
    """Maximises the probability of the right choice on the search split, and reports accuracy."""
    source = ModelSource(ModelConfig(path=model, self_check=False, merged_cache_gib=0.2))
    config = EvaluationConfig(threads=1, state_cache_gib=0.2)
    return load_evaluator(source, check_tasks([TaskConfig(data=task, search_metric="probability")]), config, tracker)


def evaluations(evaluator: Evaluator, genomes: Sequence[Genome], split: str) -> list[Evaluation]:
    found = [one for one in evaluator.evaluate(genomes, split) if isinstance(one, Evaluation)]
    assert len(found) == len(genomes), "an evaluation failed"
    return found


def fitness(evaluator: Evaluator, genomes: Sequence[Genome], split: str) -> Numbers:
    return np.array([one.fitness for one in evaluations(evaluator, genomes, split)])


def prunings(evaluator: Evaluator, space: SearchSpace, seed: int) -> Population:
    """The prunings that the search `surrogate` scores, in their order."""
    config = SearchConfig(algorithm="surrogate", num_kept=list(space.num_kept), evaluations=EVALUATIONS, seed=seed)
    search = SurrogateSearch(space, config)
    while len(search.population) < EVALUATIONS:
        asked = search.ask(10)
        outcomes = evaluator.evaluate([one.genome for one in asked], "search")
        search.tell([Individual(one, outcome) for one, outcome in zip(asked, outcomes, strict=True)])
    return search.population


def gains(evaluator: Evaluator, space: SearchSpace, seed: int) -> dict[str, Numbers]:
    """(N,) for each arm what it adds to the best pruning's scores of the test examples; under 'pruning' those."""
    found = prunings(evaluator, space, seed)
    before = Population(found.individuals[: EVALUATIONS - NUM_LAST])
    parent, rng = before.best.genome, np.random.default_rng([seed, 1])
    start = before.best.evaluation.fitness

    noisy = [
        gaussian_mutation(parent, space, rng, layer_rate=0.25, entry_rate=0.25, sigma=0.065) for _ in range(NUM_LAST)
    ]
    noise = noisy[int(fitness(evaluator, noisy, "search").argmax())]

    task = evaluator.tasks[0].name
    observed = Observer(LocalPool(evaluator).ask, {task: task}, "model").about(RouterLogits())
    repairs = Repairs(parent, [logit_likeness(None, layer) for layer in observed.layers])
    numbers, scores = searched(
        lambda asked: fitness(evaluator, [repairs.genome(one) for one in asked], "search"),
        repairs.size, start, NUM_LAST, rng,
    )  # fmt: skip
    best, mean = repairs.genome(numbers[scores.argmax()]), repairs.genome(numbers[:NUM_AVERAGED].mean(axis=0))

    every = _chosen(evaluator, [one.genome for one in found.ranked[:NUM_FINALISTS]])
    fewer = _chosen(evaluator, [*(one.genome for one in before.ranked[:NUM_FINALISTS]), mean])
    genomes = [parent, found.best.genome, noise, best, mean, every, fewer]
    by_example = [one.scores[task] for one in evaluations(evaluator, genomes, "test") if one.scores is not None]
    added = dict(zip((*ARMS, *CHOSEN), (one - by_example[0] for one in by_example[1:]), strict=True))
    return {"pruning": by_example[0], **added}


def _chosen(evaluator: Evaluator, finalists: Sequence[Genome]) -> Genome:
    """The best on the validation split; of equals the first."""
    return finalists[int(fitness(evaluator, finalists, "validation").argmax())]


def row(title: str, cells: Sequence[dict[str, Numbers]]) -> str:
    """Means of cells, with their standard errors: over examples for one cell, over cells for several."""
    figures = [f"{np.mean([one['pruning'].mean() for one in cells]):.3f}"]
    for arm in (*ARMS, *CHOSEN):
        values = cells[0][arm] if len(cells) == 1 else np.array([one[arm].mean() for one in cells])
        figures.append(f"{values.mean():+.3f} ± {values.std(ddof=1) / np.sqrt(len(values)):.3f}")
    return f"| {title} | {' | '.join(figures)} |"


def difference(first: str, second: str, cells: Sequence[dict[str, Numbers]]) -> str:
    """How much more one way adds than another, with the standard error over cells."""
    values = np.array([(one[first] - one[second]).mean() for one in cells])
    error = values.std(ddof=1) / np.sqrt(len(values))
    return f"{first} less {second}: {values.mean():+.3f} ± {error:.3f} (standard error over {len(values)} cells)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["arith", "nli", "syll", "city"], help="embedded tasks")
    parser.add_argument("--models", nargs="+", default=list(NUM_KEPT), choices=list(NUM_KEPT))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    tracker = TerminalTracker(Console(file=sys.stderr))
    columns = ["best pruning of 160", *ARMS, *CHOSEN]
    print(f"| model, kept, task | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}", flush=True)
    found: dict[str, list[dict[str, Numbers]]] = {}
    for model in options.models:
        for task in options.tasks:
            evaluator = evaluator_of(model, task, tracker)
            for num_kept in NUM_KEPT[model]:
                space = SearchSpace.build(evaluator.model.shape, num_kept=num_kept)
                for seed in options.seeds:
                    found.setdefault(f"{model}, {num_kept}", []).append(gains(evaluator, space, seed))
                    print(row(f"{model}, {num_kept}, {task}", found[f"{model}, {num_kept}"][-1:]), flush=True)
    for title, cells in found.items():
        print(row(f"**{title}**", cells))
    every = [one for cells in found.values() for one in cells]
    print(row("**all**", every))
    for first, second in ((ARMS[3], ARMS[0]), (CHOSEN[1], CHOSEN[0])):
        print(f"\n{difference(first, second, every)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Searches with several objectives: the front that they find, and what every search promises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moe_evo.config.search import SearchConfig
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Candidate, Evaluation, EvaluationFailure, Individual
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.fronts import front_of, hypervolume, reference_point
from moe_evo.searches.masks import MaskSpace
from moe_evo.searches.objectives import Objectives
from moe_evo.searches.registry import build_search
from moe_evo.testing import searches
from moe_evo.testing.searches import space_of

BOUNDS = {"min": 2, "max": 8}
KINDS = {
    "parameters": (["quality", "parameters"], space_of([8] * 6, BOUNDS, top_k=2)),
    "active": (["quality", "active"], space_of([8] * 6, 4, top_k=2, varies_top_k=True)),
    "tasks": (["tasks"], space_of([8] * 6, 4, top_k=2)),
    "three": (["quality", "parameters", "active"], space_of([8] * 6, BOUNDS, top_k=2, varies_top_k=True)),
}


def config_of(objectives: list[str], algorithm: str = "surrogate", seed: int = 0, evaluations: int = 120):
    num_kept = BOUNDS if "parameters" in objectives else 4
    return SearchConfig(
        algorithm=algorithm, objectives=objectives, num_kept=num_kept, seed=seed, evaluations=evaluations
    )


class Trade:
    """Experts have worths, and two tasks want different ones; fewer active experts cost quality in some layers."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        worths = rng.exponential(1.0, (2, 6, 8)) * np.array([3.0, 0.2, 1.0, 0.1, 2.0, 0.5])[:, None]
        self.worths = worths / worths.sum(axis=(1, 2), keepdims=True)
        self.noise = np.random.default_rng([seed, 1])

    def truth(self, genome: Genome) -> list[float]:
        lost = 0.03 * sum((2 - top_k) * (layer % 3) for layer, top_k in enumerate(genome.top_k))
        kept = [[sum(one[layer][list(kept)].sum() for layer, kept in enumerate(genome.kept))] for one in self.worths]
        return [1 - float(np.exp(-3 * one)) - lost for (one,) in kept]

    def evaluate(self, genome: Genome) -> Evaluation:
        scores = [np.full(50, one + self.noise.normal(0, 0.02)) for one in self.truth(genome)]
        mean = float(np.mean(scores))
        return Evaluation(mean, standard_error=0.02, num_examples=100, scores=dict(zip("ab", scores, strict=True)))

    def exactly(self, one: Individual) -> Individual:
        scores = [np.full(50, value) for value in self.truth(one.genome)]
        return replace(one, outcome=Evaluation(float(np.mean(scores)), scores=dict(zip("ab", scores, strict=True))))


def front_found(algorithm: str, objectives: list[str], space: SearchSpace, seed: int) -> np.ndarray:
    task, search = Trade(seed), build_search(space, config_of(objectives, algorithm, seed))
    for _ in range(12):
        search.tell([Individual(one, task.evaluate(one.genome)) for one in search.ask(10)])
    points = Objectives(objectives).points([task.exactly(one) for one in search.population])
    return points[front_of(points)]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_it_finds_a_better_front_than_random_search(kind: str, seed: int) -> None:
    objectives, space = KINDS[kind]
    fronts = {one: front_found(one, objectives, space, seed) for one in ("surrogate", "random")}
    reference = reference_point(np.concatenate(list(fronts.values())))
    volumes = {one: hypervolume(front, reference) for one, front in fronts.items()}
    assert volumes["surrogate"] > 1.05 * volumes["random"], volumes


@pytest.mark.parametrize("kind", KINDS)
def test_objectives_of_masks_and_of_individuals_are_the_same(kind: str) -> None:
    objectives, space = Objectives(KINDS[kind][0]), KINDS[kind][1]
    masks = MaskSpace(space)
    drawn = masks.drawn(20, np.random.default_rng(0))
    scores = {"b": np.array([0.0, 1.0]), "a": np.array([0.0, 0.0, 0.0, 1.0])}
    told = [
        Individual(Candidate(number, masks.genome(one), "random_pruning"), Evaluation(0.375, scores=scores))
        for number, one in enumerate(drawn)
    ]
    points = objectives.points(told)
    num_learned = 2 if kind == "tasks" else 1
    np.testing.assert_array_equal(points[:, num_learned:], objectives.known(masks, drawn))
    assert points[0, :num_learned].tolist() == ([0.25, 0.5] if kind == "tasks" else [0.375])
    assert [abs(one) for one in points[0]] == list(objectives.values(told[0]).values())


def test_names_of_objectives_say_what_their_numbers_are() -> None:
    genome = Genome.from_kept([range(4), range(3)], 8, [2, 1])
    told = Evaluation(0.5, scores={"b": np.ones(2), "a": np.zeros(2)})
    one = Individual(Candidate(0, genome, "random_pruning"), told)
    assert Objectives(["tasks", "active"]).values(one) == {"quality a": 0.0, "quality b": 1.0, "top_k": 1.5}
    assert Objectives(["quality", "parameters"]).values(one) == {"quality": 0.5, "experts": 3.5}


def test_a_batch_is_spread_over_the_front() -> None:
    objectives, space = KINDS["parameters"]
    task, search = Trade(0), build_search(space, config_of(objectives))
    for _ in range(6):
        search.tell([Individual(one, task.evaluate(one.genome)) for one in search.ask(10)])
    sizes = [sum(one.genome.num_kept) for one in search.ask(10)]
    assert len(set(sizes)) >= 5 and max(sizes) - min(sizes) >= 10


class TestSeveralObjectives(searches.SearchContract):
    """What every search promises, in spaces where also the sums and top_k are free."""

    @pytest.fixture(params=["parameters", "active", "three"])
    def space(self, request: pytest.FixtureRequest) -> SearchSpace:
        self.objectives = KINDS[request.param][0]
        return KINDS[request.param][1]

    @pytest.fixture(params=["random", "surrogate"])
    def algorithm(self, request: pytest.FixtureRequest) -> str:
        return request.param

    objectives = ("quality", "parameters")

    def config(self, algorithm: str, seed: int = 0, evaluations: int = searches.BUDGET) -> SearchConfig:
        return config_of(list(self.objectives), algorithm, seed, evaluations)


def test_failures_are_no_points_of_a_front() -> None:
    objectives, space = KINDS["parameters"]
    task, search = Trade(0), build_search(space, config_of(objectives))
    for _ in range(6):
        failed = EvaluationFailure("out_of_memory", "...")
        search.tell(
            [Individual(one, failed if one.number % 3 else task.evaluate(one.genome)) for one in search.ask(10)]
        )
    assert len(search.population) == 20

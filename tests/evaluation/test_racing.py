"""Racing: who is stopped, on how many examples a score rests, and that it is off by default."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import tiny_tasks as tiny

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.errors import ConfigError
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.evaluation.racing import PARTS, is_beaten, parts_of
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Candidate, Evaluation, EvaluationFailure, ExampleScores, Individual, Population
from moe_evo.models.view import MoEModel
from moe_evo.report.figure import draw_curve
from moe_evo.report.payload import rises
from moe_evo.tasks.base import TaskScores
from moe_evo.tracking.curves import SearchStatistics

GENOME = Genome.from_kept([[0, 2], [1, 3]], 4, 2)
OTHER = Genome.from_kept([[0, 1], [1, 2]], 4, 2)
ROWS = [{"prompt": f"one {n} two", "choices": [" yes", " no no"], "label": n % 2} for n in range(60)]


def seen(scores: np.ndarray, numbers: list[int]) -> TaskScores:
    return TaskScores(np.array(numbers), scores[numbers], None, {})


@pytest.fixture(scope="module")
def moe() -> MoEModel:
    return MoEModel(tiny.tiny_mixtral(), tiny.tiny_tokenizer(bos=True))


@pytest.fixture
def racing(moe: MoEModel, tmp_path: Path) -> Evaluator:
    tasks = [
        tiny.make_task(tmp_path / "choice", ROWS, moe.tokenizer, batch_tokens=512),
        tiny.make_task(tmp_path / "texts", [{"text": row["prompt"]} for row in ROWS[:40]], moe.tokenizer),
    ]
    return Evaluator(moe, tasks, EvaluationConfig(race=0.95))


def evaluated(
    evaluator: Evaluator, rivals: Sequence[ExampleScores] | None = None, split: str = "search", genome: Genome = GENOME
) -> Evaluation:
    outcome = evaluator.evaluate([genome], split, rivals=rivals)[0]
    assert isinstance(outcome, Evaluation)
    return outcome


def test_parts_are_fixed_and_hold_every_example_once() -> None:
    parts = parts_of(201)
    assert [len(part) for part in parts] == [41, 60, 100]
    assert sorted(number for part in parts for number in part) == list(range(201))
    assert parts_of(201) == parts and parts[0] != list(range(41))
    assert PARTS[-1] == 1.0 and sum(map(len, parts_of(1))) == 1


def test_a_worse_individual_is_beaten_and_an_equal_or_better_one_is_not() -> None:
    rng = np.random.default_rng(0)
    rival = (rng.random(400) < 0.8).astype(float)
    numbers = parts_of(400)[0]
    worse = np.where(rng.random(400) < 0.3, 0.0, rival)
    assert is_beaten([seen(worse, numbers)], [rival], 0.95)
    assert not is_beaten([seen(rival, numbers)], [rival], 0.95)
    assert not is_beaten([seen(1 - (1 - rival) * 0.5, numbers)], [rival], 0.95)
    slightly = rival.copy()
    slightly[numbers[0]] = 1 - slightly[numbers[0]]
    assert not is_beaten([seen(slightly, numbers)], [rival], 0.95)


def test_tasks_count_alike_and_too_few_examples_decide_nothing() -> None:
    ones, zeros = np.ones(100), np.zeros(100)
    numbers = list(range(50))
    assert is_beaten([seen(zeros, numbers), seen(zeros, numbers)], [ones, zeros], 0.95)
    assert not is_beaten([seen(zeros, numbers), seen(ones, numbers)], [ones, zeros], 0.95)
    assert not is_beaten([seen(zeros, numbers[:15])], [ones], 0.95)


def test_the_chance_to_stop_an_equal_individual_is_about_what_was_chosen() -> None:
    rng = np.random.default_rng(1)
    numbers = parts_of(200)[0]
    stopped = sum(
        is_beaten([seen((rng.random(200) < 0.7).astype(float), numbers)], [(rng.random(200) < 0.7).astype(float)], 0.95)
        for _ in range(2000)
    )
    # the true scores of two such draws differ, so the chance is that of differing by more than the part shows
    assert 0.01 < stopped / 2000 < 0.08


def test_without_a_rival_all_examples_are_seen_and_scores_are_kept(racing: Evaluator) -> None:
    outcome = evaluated(racing)
    assert not outcome.is_stopped and outcome.num_examples == 100
    assert outcome.scores is not None and {name: len(one) for name, one in outcome.scores.items()} == {
        "choice": 60,
        "texts": 40,
    }
    means = [one.mean() for one in outcome.scores.values()]
    assert outcome.fitness == pytest.approx(np.mean(means))


def test_one_that_is_surely_worse_is_stopped_after_the_first_part_that_shows_it(racing: Evaluator) -> None:
    own = evaluated(racing).scores
    assert own is not None
    better = {"choice": own["choice"] + 1.0, "texts": own["texts"]}
    outcome = evaluated(racing, [better])
    assert outcome.is_stopped and outcome.num_examples == 30 + 20  # a fifth of `texts` is too few to decide
    assert not evaluated(racing, [own]).is_stopped


def test_racing_together_gives_each_what_it_gets_alone(racing: Evaluator) -> None:
    own = evaluated(racing).scores
    assert own is not None
    better = {name: one + 1.0 for name, one in own.items()}
    both = racing.evaluate([GENOME, OTHER], "search", rivals=[better, None])
    assert [isinstance(one, Evaluation) and one.is_stopped for one in both] == [True, False]
    for one, alone in zip(both, (evaluated(racing, [better]), evaluated(racing, genome=OTHER)), strict=True):
        assert isinstance(one, Evaluation)
        assert (one.fitness, one.num_examples) == (pytest.approx(alone.fitness, abs=1e-6), alone.num_examples)


def test_only_the_search_split_is_raced_and_only_where_asked_for(racing: Evaluator, moe: MoEModel) -> None:
    own = evaluated(racing, split="validation").scores
    assert own is not None
    assert not evaluated(racing, [{name: one + 9.0 for name, one in own.items()}], split="validation").is_stopped
    plain = Evaluator(moe, racing.tasks, EvaluationConfig())
    scores = evaluated(plain).scores
    assert scores is not None
    assert not evaluated(plain, [{name: one + 9.0 for name, one in scores.items()}]).is_stopped
    for name, one in (evaluated(racing).scores or {}).items():
        np.testing.assert_allclose(one, scores[name], atol=1e-5)


def test_a_genome_with_broken_numbers_fails_after_the_first_part(racing: Evaluator) -> None:
    (outcome,) = racing.evaluate([tiny.tiny_merge(racing.model.shape, scale=1e30)], "search", rivals=[None])
    assert isinstance(outcome, EvaluationFailure) and outcome.kind == "non_finite"


def one(number: int, fitness: float, stopped: bool) -> Individual:
    outcome = Evaluation(fitness, scores=None if stopped else {})
    return Individual(Candidate(number, GENOME, "random_pruning"), outcome)


def test_an_estimate_is_never_shown_as_the_best(tmp_path: Path) -> None:
    individuals = [one(0, 0.5, False), one(1, 0.9, True), one(2, 0.6, False)]
    statistics = SearchStatistics()
    assert [statistics.add(each)["best/fitness"] for each in individuals] == [0.5, 0.5, 0.6]
    assert rises([each.outcome for each in individuals]) == [(1, 0.5), (3, 0.6)]
    figure, axes = plt.subplots()
    draw_curve(axes, individuals, [], 0.7, "fitness")
    (best,) = (line for line in axes.lines if line.get_label() == "best so far")
    assert list(best.get_ydata()) == [0.5, 0.5, 0.6]
    assert [text.get_text() for text in axes.get_legend().get_texts()][:2] == ["pruning", "stopped early"]
    plt.close(figure)


def test_those_that_were_stopped_rank_last() -> None:
    population = Population().with_outcomes([one(0, 0.9, True), one(1, 0.5, False), one(2, 0.7, False)])
    assert [each.number for each in population.ranked] == [2, 1, 0]
    assert [each.number for each in population.complete] == [1, 2]
    grown = population.with_outcomes([one(3, 0.6, False), one(4, 0.95, True)])
    assert [each.number for each in grown.ranked] == [2, 3, 1, 4, 0]
    everyone = Population((one(1, 0.5, False),))
    assert everyone.complete is everyone


@pytest.mark.parametrize(
    ("options", "message"),
    [({"race": 1.0}, "evaluation.race: got 1.0"), ({"race": 0.4}, "0.4"), ({"race": 0.9, "fitness": "worst"}, "worst")],
)
def test_what_cannot_be_raced_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluationConfig(**options)

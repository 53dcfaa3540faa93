"""Task-specific pruning against the same windows gone through by hand, one prompt at a time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import tiny_tasks as tiny
from asking import observer_of
from tiny_models import tiny_model

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.criteria.registry import METHODS, check_methods
from moe_evo.criteria.task_specific import TaskSpecific
from moe_evo.errors import ConfigError
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.space import SearchSpace
from moe_evo.models.experts.outputs import observed_experts
from moe_evo.models.view import MoEModel

WORDS = ["one", "two", "three", "four", "five", "six", "yes", "no", "good", "bad", "maybe"]
PROMPTS = [" ".join(WORDS[n % 4 : n % 4 + 1 + (3 * n) % 7]) + (f" {n}" if n % 3 else "") for n in range(24)]
ROWS = [{"prompt": prompt, "choices": [" yes", " no no"], "label": 0} for prompt in PROMPTS]


def made(family, folder, rows=ROWS):
    moe = MoEModel(tiny_model(family, vocab_size=350), tiny.tiny_tokenizer(bos=True))
    task = tiny.make_task(folder, rows, moe.tokenizer)
    return moe, observer_of(Evaluator(moe, [task], EvaluationConfig()))


def by_hand(moe, prompts, method, num_kept, groups):
    """The genome, and how many experts of each layer were left after each window."""
    alive = [list(range(8)) for _ in moe.layers]
    average = [None] * len(moe.layers)
    left = []
    for window in range(method.num_windows):
        counts = np.zeros((len(moe.layers), 8))

        def see(layer, index, gates, outputs, counts=counts):
            for expert in index.reshape(-1).tolist():
                counts[layer, expert] += 1

        with moe.applied(Genome.from_kept(alive, 8, 2)), observed_experts(moe, see):
            for prompt in prompts[window :: method.num_windows]:
                tiny.alone(moe.language_model, moe.tokenizer(prompt)["input_ids"])
        for group in groups:
            total = counts[list(group)].sum(axis=0)
            share = total / total.sum()
            old = average[group[0]]
            average[group[0]] = share if old is None else 0.9 * old + 0.1 * share
            now = alive[group[0]]
            ranked = sorted(now, key=lambda expert: -average[group[0]][expert])
            stays = [expert for expert in now if average[group[0]][expert] >= method.threshold / len(now)]
            if len(stays) < num_kept or window == method.num_windows - 1:
                stays = ranked[:num_kept]
            for layer in group:
                alive[layer] = sorted(stays)
        left.append(tuple(map(len, alive)))
    return Genome.from_kept(alive, 8, 2), left


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "glm4_moe", "gpt_oss"])
def test_experts_go_window_after_window_as_by_hand(tmp_path, family):
    moe, observer = made(family, tmp_path)
    method = TaskSpecific(num_windows=4, threshold=0.5)
    expected, left = by_hand(moe, PROMPTS, method, 3, [(layer,) for layer in range(len(moe.layers))])
    assert any(3 < number < 8 for number in left[0]), "nobody went before the last window"
    space = SearchSpace.build(moe.shape, num_kept=3)
    genome = method.genome(observer, space)
    space.check(genome)
    assert genome == expected


def test_layers_that_share_genes_lose_the_same_experts(tmp_path):
    moe, observer = made("mixtral", tmp_path)
    method = TaskSpecific(num_windows=4, threshold=0.5)
    genome = method.genome(observer, SearchSpace.build(moe.shape, num_kept=3, num_layer_groups=2))
    assert genome == by_hand(moe, PROMPTS, method, 3, [(0, 1), (2,)])[0]


def test_windows_without_examples_change_nothing(tmp_path):
    moe, observer = made("mixtral", tmp_path, ROWS[:2])
    space = SearchSpace.build(moe.shape, num_kept=4)
    few, many = (TaskSpecific(num_windows=number).genome(observer, space) for number in (2, 10))
    assert few == many


def test_groups_of_experts_are_refused_in_one_line(tmp_path):
    moe, observer = made("deepseek_v3", tmp_path)
    with pytest.raises(ConfigError, match=r"^task_specific: drops experts one by one, but deepseek_v3 chooses [^\n]*$"):
        METHODS["task_specific"].genome(observer, SearchSpace.build(moe.shape, num_kept=4))
    check_methods("search.init", ["task_specific"])
    with pytest.raises(ConfigError, match="task_specific: drops experts one by one"):
        check_methods("search.init", ["task_specific"], SearchSpace.build(moe.shape, num_kept=4))


def test_a_dropped_expert_never_comes_back(tmp_path, monkeypatch):
    moe, observer = made("mixtral", tmp_path)
    seen = []
    about = observer.about
    monkeypatch.setattr(observer, "about", lambda question: seen.append(question) or about(question))
    TaskSpecific(num_windows=6, threshold=0.6).genome(observer, SearchSpace.build(moe.shape, num_kept=2))
    kept = [[set(layer) for layer in question.genome.kept] for question in seen]
    assert len(kept) == 6 and [question.part for question in seen] == [(window, 6) for window in range(6)]
    for before, after in pairwise(kept):
        assert all(later <= earlier for earlier, later in zip(before, after, strict=True))

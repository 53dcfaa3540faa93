"""Leave-one-out and NAEE against loops over tokens, experts and choices; exact and sampled choices."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import comb

import brute_force
import numpy as np
import pytest
import tiny_tasks as tiny
from asking import observer_of
from tiny_models import tiny_model

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.criteria import subset_trials
from moe_evo.criteria.naee import Naee
from moe_evo.criteria.questions import Trials
from moe_evo.criteria.registry import CRITERIA, METHODS, check_methods
from moe_evo.criteria.subsets import all_but_one, subsets
from moe_evo.errors import ModelError
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.operators import random_pruning
from moe_evo.genomes.space import SearchSpace
from moe_evo.models.view import MoEModel

WORDS = ["one", "two", "three", "four", "five", "six", "yes", "no", "good", "bad", "maybe"]
PROMPTS = [" ".join(WORDS[n % 4 : n % 4 + 1 + (3 * n) % 7]) for n in range(8)]
ROWS = [{"prompt": prompt, "choices": [" yes", " no no"], "label": 0} for prompt in PROMPTS]
# a renormalised softmax, one that is not, one with groups, a sigmoid with bias and groups, softmax after top-k
FAMILIES = ("mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss")


def made(family, folder):
    """A view in float64 whose gates are not renormalised where a config may say so, and an observer."""
    changes = {"norm_topk_prob": False} if family == "olmoe" else {}
    model = tiny_model(family, vocab_size=350, **changes).double()
    model.set_experts_implementation("eager")  # the default one knows no float64
    moe = MoEModel(model, tiny.tiny_tokenizer(bos=True))
    task = tiny.make_task(folder, ROWS, moe.tokenizer, batch_tokens=64)
    return moe, observer_of(Evaluator(moe, [task], EvaluationConfig()))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    return made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return made("mixtral", tmp_path_factory.mktemp("mixtral"))


def sequences_of(moe):
    return [moe.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def choices_of(moe, num_kept):
    """Every choice that the family allows, from itertools alone."""
    size = 8 // moe.shape.num_expert_groups
    found = combinations(range(8), num_kept)
    each = num_kept // moe.shape.num_expert_groups
    return [one for one in found if all(sum(e // size == g for e in one) == each for g in range(8 // size))]


def test_leave_one_out_equals_loops_over_tokens_and_experts(case):
    moe, observer = case
    sequences = sequences_of(moe)
    choices = [[other for other in range(8) if other != expert] for expert in range(8)]
    num_tokens = sum(map(len, sequences))
    expected = np.array(brute_force.trials(moe.language_model, sequences, choices)) / num_tokens
    scores = CRITERIA["leave_one_out"].scores(observer)
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-12)
    assert all(layer.num_tokens == num_tokens for layer in observer.about(Trials()).layers)


def test_naee_keeps_the_best_of_all_choices_as_loops_find_it(case):
    moe, observer = case
    space = SearchSpace.build(moe.shape, num_kept=4)
    choices = choices_of(moe, 4)
    assert len(choices) == comb(8 // moe.shape.num_expert_groups, 4 // moe.shape.num_expert_groups) ** (
        moe.shape.num_expert_groups
    )
    expected = np.array(brute_force.trials(moe.language_model, sequences_of(moe), choices))
    layers = observer.about(Trials(num_kept=space.num_kept, top_k=space.top_k)).layers
    for layer, errors in zip(layers, expected, strict=True):
        np.testing.assert_allclose(np.sort(layer.errors), np.sort(errors), rtol=1e-6, atol=1e-12)
    genome = METHODS["naee"].genome(observer, space)
    space.check(genome)
    assert genome.kept == tuple(choices[place] for place in expected.argmin(axis=1))


def test_layers_that_share_genes_keep_the_choice_with_the_least_sum_of_losses(mixtral):
    moe, observer = mixtral
    space = SearchSpace.build(moe.shape, num_kept=4, num_layer_groups=1)
    choices = choices_of(moe, 4)
    expected = np.array(brute_force.trials(moe.language_model, sequences_of(moe), choices))
    assert len(set(expected.argmin(axis=1))) > 1, "all layers want the same"
    assert METHODS["naee"].genome(observer, space).kept == (choices[expected.sum(axis=0).argmin()],) * 3


def test_another_top_k_is_tried_with_that_many_experts(mixtral):
    moe, observer = mixtral
    space = SearchSpace.build(moe.shape, num_kept=4, top_k=1)
    choices = choices_of(moe, 4)
    expected = np.array(brute_force.trials(moe.language_model, sequences_of(moe), choices, top_k=1))
    genome = METHODS["naee"].genome(observer, space)
    assert genome.top_k == (1, 1, 1)
    assert genome.kept == tuple(choices[place] for place in expected.argmin(axis=1))


def loss_of(observer, space, genome, layer):
    """NAEE's loss of what a genome keeps in a layer, from the answers to the same question."""
    errors = observer.about(Trials(num_kept=space.num_kept, top_k=space.top_k)).layers[layer].errors
    kept = np.isin(np.arange(8), genome.kept[layer])
    (place,) = np.flatnonzero((subsets(8, 4, space.shape.num_expert_groups) == kept).all(axis=1))
    return errors[place]


def test_no_random_or_greedy_search_finds_a_better_choice_than_the_enumeration(case):
    moe, observer = case
    space = SearchSpace.build(moe.shape, num_kept=4)
    best = METHODS["naee"].genome(observer, space)
    others = [random_pruning(space, np.random.default_rng(seed)) for seed in range(20)]
    others += [CRITERIA[name].genome(observer, space) for name in ("reap", "leave_one_out")]  # greedy ones
    for layer in range(moe.shape.num_layers):
        least = loss_of(observer, space, best, layer)
        assert all(least <= loss_of(observer, space, other, layer) for other in others)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_progressive_naee_tries_each_layer_behind_the_pruned_ones(tmp_path, family):
    moe, observer = made(family, tmp_path)
    space = SearchSpace.build(moe.shape, num_kept=4)
    choices = choices_of(moe, 4)
    kept = [tuple(range(8))] * moe.shape.num_layers
    for layer in range(moe.shape.num_layers):
        with moe.applied(Genome.from_kept(kept, 8, 2)):  # the loops see what comes out of pruned layers
            expected = brute_force.trials(moe.language_model, sequences_of(moe), choices)[layer]
        kept[layer] = choices[int(np.argmin(expected))]
    assert METHODS["naee"].progressive_genome(observer, space).kept == tuple(kept)
    assert METHODS["naee"].genome(observer, space).kept[0] == kept[0]


def test_a_sample_of_choices_is_used_where_there_are_too_many(mixtral):
    moe, observer = mixtral
    space = SearchSpace.build(moe.shape, num_kept=4)
    sampled, again, other = (Naee("naee", limit=20, seed=seed).genome(observer, space) for seed in (0, 0, 1))
    assert sampled == again
    for genome, seed in ((sampled, 0), (other, 1)):
        allowed = [tuple(np.flatnonzero(one)) for one in subsets(8, 4, limit=20, seed=seed)]
        assert all(kept in allowed for kept in genome.kept)
    exact = METHODS["naee"].genome(observer, space)
    assert all(loss_of(observer, space, exact, layer) <= loss_of(observer, space, sampled, layer) for layer in range(3))


def test_trials_that_are_routed_a_few_at_a_time_find_the_same(mixtral, monkeypatch):
    _, observer = mixtral
    question = Trials(num_kept=(4, 4, 4))
    expected = observer.about(question)
    monkeypatch.setattr(subset_trials, "_ROUTED", 64)
    for one, other in zip(observer.about(replace(question, seed=1)).layers, expected.layers, strict=True):
        np.testing.assert_allclose(one.errors, other.errors, rtol=1e-9)


@pytest.mark.parametrize(("groups", "number"), [(1, 70), (2, 36), (4, 16)])
def test_subsets_are_all_that_keep_the_same_number_in_each_group(groups, number):
    masks = subsets(8, 4, groups)
    assert len(np.unique(masks, axis=0)) == len(masks) == number
    assert (masks.reshape(len(masks), groups, -1).sum(axis=2) == 4 // groups).all()


def test_sampled_subsets_differ_from_each_other_and_follow_the_seed():
    masks = subsets(64, 32, 8, limit=200, seed=3)
    assert masks.shape == (200, 64) and len(np.unique(masks, axis=0)) == 200
    assert (masks.reshape(200, 8, 8).sum(axis=2) == 4).all()
    assert np.array_equal(masks, subsets(64, 32, 8, limit=200, seed=3))
    assert not np.array_equal(masks, subsets(64, 32, 8, limit=200, seed=4))


def test_all_but_one_leaves_out_each_expert_in_turn():
    masks = all_but_one(5)
    assert [list(np.flatnonzero(~one)) for one in masks] == [[0], [1], [2], [3], [4]]


def test_a_router_that_can_spare_no_expert_is_refused_in_one_line(tmp_path):
    model = tiny_model("deepseek_v3", vocab_size=350, n_group=4, topk_group=2)
    moe = MoEModel(model, tiny.tiny_tokenizer(bos=True))
    observer = observer_of(Evaluator(moe, [tiny.make_task(tmp_path, ROWS, moe.tokenizer)], EvaluationConfig()))
    with pytest.raises(
        ModelError, match=r"^deepseek_v3 model: uses 2 of 8 experts in 4 groups and can spare none[^\n]*$"
    ):
        CRITERIA["leave_one_out"].scores(observer)
    space = SearchSpace.build(moe.shape, num_kept=8)
    with pytest.raises(ModelError, match="can spare none"):  # known from the shape alone
        check_methods("--method", ["leave_one_out"], space)
    check_methods("--method", ["reap", "naee"], space)

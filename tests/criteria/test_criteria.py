"""Every criterion of every family against loops over tokens and experts; prunings by scores."""

from __future__ import annotations

import brute_force
import numpy as np
import pytest
import tiny_tasks as tiny
import torch
from tiny_models import CONFIGS, tiny_model

from moe_evo.config import EvaluationConfig
from moe_evo.criteria.frequency import routing_counts
from moe_evo.criteria.observation import LayerObservation, Observation, observe, together
from moe_evo.criteria.pruning import pruning_by
from moe_evo.criteria.registry import CRITERIA, ActivationCriterion, WeightCriterion
from moe_evo.criteria.weights import LayerWeights, expert_weights
from moe_evo.errors import ModelError
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.models.view import MoEModel
from moe_evo.space import ModelShape, SearchSpace

WORDS = ["one", "two", "three", "four", "five", "six", "yes", "no", "good", "bad", "maybe"]
PROMPTS = [" ".join(WORDS[n % 4 : n % 4 + 1 + (3 * n) % 7]) + (f" {n}" if n % 3 else "") for n in range(24)]
ROWS = [{"prompt": prompt, "choices": [" yes", " no no"], "label": 0} for prompt in PROMPTS]
EXACT = {"rtol": 1e-6, "atol": 1e-12}


def mean(name):
    return lambda sums: np.array([s / n if n else 0.0 for s, n in zip(sums[name], sums["tokens"], strict=True)])


ORACLES = {
    "frequency": lambda sums: sums["tokens"],
    "soft_frequency": lambda sums: sums["gates"],
    "ean": lambda sums: sums["norms"],
    "mean_ean": mean("norms"),
    "weighted_ean": lambda sums: sums["gated_norms"],
    "reap": mean("gated_norms"),
    "msan": mean("squared_norms"),
}


def changes(model_type):
    """More words than the tiny models have, and weights that are not renormalised where a config may say so."""
    may_say = {"olmoe", "qwen2_moe"}
    return {"vocab_size": 350, **({"norm_topk_prob": False} if model_type in may_say else {})}


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def case(request, tmp_path_factory):
    """A view in float64, an evaluator, and what brute force finds on its prompts."""
    model = tiny_model(request.param, **changes(request.param)).double()
    model.set_experts_implementation("eager")  # the default one knows no float64
    tokenizer = tiny.tiny_tokenizer(bos=True)
    moe = MoEModel(model, tokenizer)
    task = tiny.make_task(tmp_path_factory.mktemp(request.param), ROWS, tokenizer, batch_tokens=128)
    counts = torch.cat([one.counts.reshape(-1) for one in task.prompt_batches("search", trees=moe.reads_trees)])
    assert (counts == 0).any() and (counts > 1).any() == moe.reads_trees, "no padding, or nothing shared"
    expected = brute_force.observe(model, [tokenizer(prompt)["input_ids"] for prompt in PROMPTS])
    return moe, Evaluator(moe, [task], EvaluationConfig()), expected


def test_observations_equal_loops_over_tokens_and_experts(case):
    moe, evaluator, expected = case
    observation = together(list(observe(evaluator).values()))
    assert observation.num_experts == moe.shape.num_experts
    for layer, sums in zip(observation.layers, expected, strict=True):
        for name, values in sums.items():
            np.testing.assert_allclose(getattr(layer, name), values, err_msg=name, **EXACT)


def test_criteria_equal_loops_over_tokens_and_experts(case):
    _, evaluator, expected = case
    (observation,) = observe(evaluator).values()
    found = {
        name: criterion.scores(observation)
        for name, criterion in CRITERIA.items()
        if isinstance(criterion, ActivationCriterion)
    }
    assert found.keys() == ORACLES.keys()
    for name, scores in found.items():
        for got, sums in zip(scores, expected, strict=True):
            np.testing.assert_allclose(got, ORACLES[name](sums), err_msg=name, **EXACT)


def test_aimer_equals_a_loop_over_all_weights(case):
    moe, _, _ = case
    criterion = CRITERIA["aimer"]
    assert isinstance(criterion, WeightCriterion)
    for got, expected in zip(criterion.scores(expert_weights(moe)), brute_force.aimer(moe.language_model), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_a_renormalised_softmax_and_one_that_is_not_are_both_here(case):
    moe, _, expected = case
    sums_to_one = all(
        abs(sums["gates"].sum() - sums["tokens"].sum() / k) < 1e-6
        for sums, k in zip(expected, moe.shape.top_k, strict=True)
    )
    not_one = {"olmoe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe"}  # the latter three scale, too
    assert sums_to_one == (moe.shape.family not in not_one)


def test_frequency_is_what_the_routers_count(case):
    _, evaluator, _ = case
    (observation,) = observe(evaluator).values()
    counts = routing_counts(evaluator)
    assert all(map(np.array_equal, (layer.tokens for layer in observation.layers), counts))


def test_every_criterion_makes_a_pruning_of_the_space(case):
    moe, evaluator, _ = case
    space = SearchSpace.build(moe.shape, num_kept=4)
    (observation,) = observe(evaluator).values()
    weights = expert_weights(moe)
    for criterion in CRITERIA.values():
        is_of_weights = isinstance(criterion, WeightCriterion)
        genome = pruning_by(criterion.scores(weights if is_of_weights else observation), space)
        space.check(genome)
        assert genome.is_pruning and genome.num_kept == (4,) * moe.shape.num_layers
    counts = [layer.tokens for layer in observation.layers]
    assert pruning_by(CRITERIA["frequency"].scores(observation), space) == pruning_by(counts, space)


def test_criteria_are_registered_under_their_names_with_a_line_and_a_source():
    for name, criterion in CRITERIA.items():
        assert criterion.name == name
        assert criterion.description and "\n" not in criterion.description and criterion.source


def test_an_expert_without_tokens_scores_lowest_in_every_criterion():
    layer = LayerObservation(*([[3.0, 0.0, 1.0]] * 5))
    for criterion in CRITERIA.values():
        if isinstance(criterion, ActivationCriterion):
            (scores,) = criterion.scores(Observation((layer,)))
            assert scores[1] == 0 and (scores[[0, 2]] > 0).all()


def test_aimer_scores_equal_sizes_and_zeros_minus_one_and_a_single_weight_higher():
    layer = LayerWeights(absolute=np.array([4.0, 0.0, 1.0]), squared=np.array([4.0, 0.0, 1.0]), num_weights=4)
    (scores,) = CRITERIA["aimer"].scores([layer])
    np.testing.assert_allclose(scores, [-1, -1, -0.5])


SHAPE = ModelShape("mixtral", num_experts=(4, 4), top_k=(1, 1), decoder_layers=(0, 1))


def test_the_highest_scores_are_kept_and_the_lower_number_wins_a_tie():
    space = SearchSpace.build(SHAPE, num_kept=2)
    scores = [np.array([-3.0, -1.0, -2.0, -1.0]), np.array([0.0, 0.0, 0.0, 0.0])]
    assert pruning_by(scores, space).kept == ((1, 3), (0, 1))


def test_layers_that_share_genes_keep_what_scores_highest_in_all_of_them():
    space = SearchSpace.build(SHAPE, num_kept=2, num_layer_groups=1)
    scores = [np.array([5.0, 4.0, 0.0, 3.0]), np.array([0.0, 2.0, 4.0, 4.0])]
    assert pruning_by(scores, space).kept == ((1, 3), (1, 3))


def test_scores_that_are_no_numbers_are_refused_in_one_line():
    space = SearchSpace.build(SHAPE, num_kept=2)
    with pytest.raises(ModelError, match=r"^MoE layer 1: expert 2 scores nan, expected a finite number; [^\n]*$"):
        pruning_by([np.zeros(4), np.array([0.0, 1.0, np.nan, 2.0])], space)

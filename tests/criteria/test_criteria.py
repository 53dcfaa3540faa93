"""Every criterion of every family against loops over tokens and experts; prunings by scores."""

from __future__ import annotations

import brute_force
import numpy as np
import pytest
import tiny_tasks as tiny
import torch
from asking import observed, observer_of
from tiny_models import CONFIGS, tiny_model
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.criteria.naee import median_gate_ratio
from moe_evo.criteria.pruning import pruning_by
from moe_evo.criteria.questions import GateRatios, Routed
from moe_evo.criteria.registry import CRITERIA
from moe_evo.criteria.sums import LayerObservation, LayerOutputs, LayerRatios, LayerWeights
from moe_evo.errors import ModelError
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.space import ModelShape, SearchSpace
from moe_evo.models.view import MoEModel

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
    "easy_ep": lambda sums: sums["turned_norms"],
}
OF_ROUTED = {name: one for name, one in CRITERIA.items() if one.question == Routed()}


def changes(model_type):
    """More words than the tiny models have, and weights that are not renormalised where a config may say so."""
    may_say = {"olmoe", "qwen2_moe"}
    return {"vocab_size": 350, **({"norm_topk_prob": False} if model_type in may_say else {})}


def sequences_of(moe):
    return [moe.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def case(request, tmp_path_factory):
    """A view in float64, an observer, and what brute force finds on its prompts."""
    model = tiny_model(request.param, **changes(request.param)).double()
    model.set_experts_implementation("eager")  # the default one knows no float64
    moe = MoEModel(model, tiny.tiny_tokenizer(bos=True))
    task = tiny.make_task(tmp_path_factory.mktemp(request.param), ROWS, moe.tokenizer, batch_tokens=128)
    counts = torch.cat([one.counts.reshape(-1) for one in task.prompt_batches("search", trees=moe.reads_trees)])
    assert (counts == 0).any() and (counts > 1).any() == moe.reads_trees, "no padding, or nothing shared"
    return (
        moe,
        observer_of(Evaluator(moe, [task], EvaluationConfig())),
        brute_force.observe(model, sequences_of(moe)),
    )


def test_observations_equal_loops_over_tokens_and_experts(case):
    moe, observer, expected = case
    layers = observer.about(Routed()).layers
    assert tuple(len(layer.tokens) for layer in layers) == moe.shape.num_experts
    for layer, sums in zip(layers, expected, strict=True):
        assert set(sums) == set(LayerObservation.names())
        for name, values in sums.items():
            np.testing.assert_allclose(getattr(layer, name), values, err_msg=name, **EXACT)


def test_criteria_equal_loops_over_tokens_and_experts(case):
    _, observer, expected = case
    assert OF_ROUTED.keys() == ORACLES.keys()
    for name, criterion in OF_ROUTED.items():
        for got, sums in zip(criterion.scores(observer), expected, strict=True):
            np.testing.assert_allclose(got, ORACLES[name](sums), err_msg=name, **EXACT)


def test_aimer_equals_a_loop_over_all_weights(case):
    moe, observer, _ = case
    for got, expected in zip(CRITERIA["aimer"].scores(observer), brute_force.aimer(moe.language_model), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_mone_equals_the_variance_of_all_answers_one_after_the_other(case):
    moe, observer, _ = case
    expected = brute_force.mone(moe.language_model, sequences_of(moe))
    for got, scores in zip(CRITERIA["mone"].scores(observer), expected, strict=True):
        # answers that are all alike: their variance is a difference of sums, whose root keeps half the digits
        np.testing.assert_allclose(got, scores, rtol=1e-6, atol=1e-6)


def test_the_median_gate_ratio_is_that_of_all_tokens(case):
    moe, observer, _ = case
    ratios = brute_force.gate_ratios(moe.language_model, sequences_of(moe))
    for layer, expected in zip(observer.about(GateRatios()).layers, ratios, strict=True):
        bin_width = 1 / len(layer.counts)
        in_order, half = np.sort(expected), len(expected) / 2
        middle = in_order[int(np.ceil(half)) - 1], in_order[int(half)]  # of an even number any value between the two
        assert layer.counts.sum() == len(expected)
        assert middle[0] - bin_width <= median_gate_ratio(layer) <= middle[1] + bin_width


def test_a_renormalised_softmax_and_one_that_is_not_are_both_here(case):
    moe, _, expected = case
    sums_to_one = all(
        abs(sums["gates"].sum() - sums["tokens"].sum() / k) < 1e-6
        for sums, k in zip(expected, moe.shape.top_k, strict=True)
    )
    not_one = {"olmoe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe"}  # the latter three scale, too
    assert sums_to_one == (moe.shape.family not in not_one)


def test_every_criterion_makes_a_pruning_of_the_space(case):
    moe, observer, _ = case
    space = SearchSpace.build(moe.shape, num_kept=4)
    for criterion in CRITERIA.values():
        if not criterion.needs_base_model:
            genome = criterion.genome(observer, space)
            space.check(genome)
            assert genome.is_pruning and genome.num_kept == (4,) * moe.shape.num_layers
    counts = [layer.tokens for layer in observer.about(Routed()).layers]
    assert CRITERIA["frequency"].genome(observer, space) == pruning_by(counts, space)


def test_an_expert_without_tokens_scores_lowest_in_every_criterion():
    layer = LayerObservation(*([[3.0, 0.0, 1.0]] * len(LayerObservation.names())))
    for criterion in OF_ROUTED.values():
        scores = criterion.formula(layer)
        assert scores[1] == 0 and (scores[[0, 2]] > 0).all()


def test_mone_scores_one_token_or_none_zero_and_more_by_their_spread():
    answers = np.array([[1.0, 3.0], [4.0, 4.0], [5.0, 0.0], [0.0, 0.0]])  # sums of 2, 2, 1 and 0 answers
    # (0, 1) and (1, 2), whose variances are 0.5 and 0.5; (2, 2) twice; (5, 0)
    layer = LayerOutputs(np.array([2, 2, 1, 0]), np.array([0.5, 1, 1, 0]), np.array([6, 16, 25, 0]), answers)
    np.testing.assert_allclose(CRITERIA["mone"].formula(layer), [np.sqrt(0.5 + 0.5) * 0.5, 0, 0, 0], atol=1e-12)


def test_the_median_of_counted_ratios_lies_where_half_of_them_are_below():
    assert median_gate_ratio(LayerRatios(np.array([0.0, 0.0, 0.0, 0.0]))) == 0
    assert median_gate_ratio(LayerRatios(np.array([0.0, 4.0, 0.0, 0.0]))) == 0.375
    assert median_gate_ratio(LayerRatios(np.array([1.0, 0.0, 0.0, 3.0]))) == pytest.approx(0.75 + 0.25 / 3)
    assert median_gate_ratio(LayerRatios(np.array([2.0, 0.0, 0.0, 2.0]))) == 0.25


def test_aimer_scores_equal_sizes_and_zeros_minus_one_and_a_single_weight_higher():
    layer = LayerWeights(absolute=np.array([4.0, 0.0, 1.0]), squared=np.array([4.0, 0.0, 1.0]), num_weights=np.array(4))
    np.testing.assert_allclose(CRITERIA["aimer"].formula(layer), [-1, -1, -0.5])


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


TEXTS = [{"text": f"the capital of {word} is"} for word in WORDS]


def tiny_grouped():
    """A router of 2 groups of 4 experts, sigmoid with correction bias, behind one dense layer."""
    torch.manual_seed(2)
    sizes = tiny.SIZES | {"num_hidden_layers": 3, "num_key_value_heads": 2}
    config = DeepseekV3Config(
        **sizes, moe_intermediate_size=8, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2,
        n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config).eval()


def counted_by_hand(moe, sequences):
    counts = [np.zeros(number) for number in moe.shape.num_experts]

    def hook(layer):
        def count(_module, _inputs, output):
            for expert in output[2].reshape(-1).tolist():
                counts[layer][expert] += 1

        return count

    handles = [layer.router.register_forward_hook(hook(number)) for number, layer in enumerate(moe.layers)]
    for sequence in sequences:
        tiny.alone(moe.language_model, sequence)
    for handle in handles:
        handle.remove()
    return counts


@pytest.fixture(scope="module", params=[lambda: tiny.tiny_mixtral(8), tiny_grouped], ids=["mixtral", "grouped"])
def of_two_kinds(request, tmp_path_factory):
    """A view and an evaluator of prompts with choices, and of texts."""
    moe = MoEModel(request.param(), tiny.tiny_tokenizer(bos=True))
    folder = tmp_path_factory.mktemp("kinds")
    tasks = [tiny.make_task(folder / "choice", ROWS, moe.tokenizer), tiny.make_task(folder / "t", TEXTS, moe.tokenizer)]
    return moe, Evaluator(moe, tasks, EvaluationConfig())


def test_every_token_of_every_prompt_and_text_counts_once_and_padding_never(of_two_kinds):
    moe, evaluator = of_two_kinds
    texts = [moe.tokenizer(row["text"])["input_ids"][:-1] for row in TEXTS]  # the last token is only predicted
    expected = counted_by_hand(moe, sequences_of(moe) + texts)
    for layer, counts in zip(observed(evaluator).layers, expected, strict=True):
        np.testing.assert_array_equal(layer.tokens, counts)


def test_the_most_used_experts_of_each_group_are_kept(of_two_kinds):
    moe, evaluator = of_two_kinds
    space = SearchSpace.build(moe.shape, num_kept=4)
    genome = CRITERIA["frequency"].genome(observer_of(evaluator), space)
    space.check(genome)
    groups, size = moe.shape.num_expert_groups, 8 // moe.shape.num_expert_groups
    for layer, kept in zip(observed(evaluator).layers, genome.kept, strict=True):
        ranges = [range(first, first + size) for first in range(0, 8, size)]
        in_order = [sorted(one, key=lambda expert: -layer.tokens[expert]) for one in ranges]
        assert kept == tuple(sorted(expert for one in in_order for expert in one[: 4 // groups]))

"""Pruning by frequency against a count by hand, one prompt at a time."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_tasks as tiny
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from moe_evo.config import EvaluationConfig
from moe_evo.criteria.frequency import routing_counts
from moe_evo.criteria.pruning import pruning_by
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.models.view import MoEModel
from moe_evo.space import SearchSpace

WORDS = ["one", "two", "three", "four", "five", "six", "yes", "no", "good", "bad", "maybe"]
ROWS = [
    {
        "prompt": " ".join(WORDS[n % 4 : n % 4 + 1 + (3 * n) % 7]) + f" {n}",
        "choices": [" yes", " no no", " x"],
        "label": 0,
    }
    for n in range(10)
]
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


def counted_by_hand(moe, prompts):
    counts = [np.zeros(number) for number in moe.shape.num_experts]

    def hook(layer):
        def count(_module, _inputs, output):
            for expert in output[2].reshape(-1).tolist():
                counts[layer][expert] += 1

        return count

    handles = [layer.router.register_forward_hook(hook(number)) for number, layer in enumerate(moe.layers)]
    for prompt in prompts:
        tiny.alone(moe.language_model, moe.tokenizer(prompt)["input_ids"])
    for handle in handles:
        handle.remove()
    return counts


@pytest.fixture(scope="module", params=[lambda: tiny.tiny_mixtral(8), tiny_grouped], ids=["mixtral", "grouped"])
def moe(request):
    return MoEModel(request.param(), tiny.tiny_tokenizer(bos=True))


@pytest.fixture
def evaluator(tmp_path, moe):
    tasks = [
        tiny.make_task(tmp_path / "choice", ROWS, moe.tokenizer),
        tiny.make_task(tmp_path / "texts", TEXTS, moe.tokenizer),
    ]
    return Evaluator(moe, tasks, EvaluationConfig())


def test_every_token_of_every_prompt_counts_once_and_padding_never(moe, evaluator):
    prompts = [row["prompt"] for row in ROWS]
    tokens = [moe.tokenizer(row["text"])["input_ids"][:-1] for row in TEXTS]  # the last token is only predicted
    expected = counted_by_hand(moe, prompts)
    texts = counted_by_hand(moe, [moe.tokenizer.decode(one[1:]) for one in tokens])
    got = routing_counts(evaluator)
    for layer, counts in enumerate(got):
        np.testing.assert_array_equal(counts, expected[layer] + texts[layer])


def test_the_most_used_experts_of_each_group_are_kept(moe, evaluator):
    space = SearchSpace.build(moe.shape, num_kept=4)
    counts = routing_counts(evaluator)
    genome = pruning_by(counts, space)
    space.check(genome)
    groups = moe.shape.num_expert_groups
    size = 8 // groups
    for layer, kept in enumerate(genome.kept):
        best = [
            expert
            for group in range(groups)
            for expert in sorted(range(group * size, (group + 1) * size), key=lambda e: -counts[layer][e])[
                : 4 // groups
            ]
        ]
        assert kept == tuple(sorted(best))


def test_layers_that_share_genes_keep_what_both_use_most(moe, evaluator):
    space = SearchSpace.build(moe.shape, num_kept=4, num_layer_groups=1)
    genome = pruning_by(routing_counts(evaluator), space)
    space.check(genome)
    assert len(set(genome.layers)) == 1


def test_the_whole_pruning_is_evaluated_like_any_genome(moe, evaluator):
    genome = pruning_by(routing_counts(evaluator), SearchSpace.build(moe.shape, num_kept=4))
    assert evaluator.evaluate([genome], "validation")[0].num_examples == 4

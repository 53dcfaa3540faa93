"""MoE-Pruner's input norms of every family against loops over tokens and experts; padding never counts."""

from __future__ import annotations

import brute_force
import numpy as np
import pytest
import tiny_tasks as tiny
import torch
from asking import spoilt_padding
from tiny_models import CONFIGS, logits, tiny_model, tokens

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.criteria.input_norms import observe_input_norms
from moe_evo.errors import ModelError
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.models.compress.compression import compressed_experts
from moe_evo.models.compress.sparsity import RouterWeightedPruning
from moe_evo.models.experts.matrices import expert_matrices
from moe_evo.models.view import MoEModel

WORDS = ["one", "two", "three", "four", "five", "six", "yes", "no", "good", "bad", "maybe"]
PROMPTS = [" ".join(WORDS[n % 4 : n % 4 + 1 + (3 * n) % 7]) + (f" {n}" if n % 3 else "") for n in range(16)]
ROWS = [{"prompt": prompt, "choices": [" yes", " no no", " x"], "label": 0} for prompt in PROMPTS]


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def moe(request):
    """More words than the tiny models have, and weights that are not renormalised where a config may say so."""
    changes = {"norm_topk_prob": False} if request.param in ("olmoe", "qwen2_moe") else {}
    model = tiny_model(request.param, vocab_size=350, **changes).double()
    model.set_experts_implementation("eager")  # the default one knows no float64
    return MoEModel(model, tiny.tiny_tokenizer(bos=True))


def evaluator_of(moe, folder, rows=ROWS, **options):
    tasks = [tiny.make_task(folder, rows, moe.tokenizer, **options)]
    return Evaluator(moe, tasks, EvaluationConfig())


def assert_norms(found, expected):
    for layer, sums in zip(found, expected, strict=True):
        for name, values in sums.items():
            np.testing.assert_allclose(getattr(layer, name), values, rtol=1e-6, atol=1e-12, err_msg=name)


def test_input_norms_equal_loops_over_tokens_and_experts(moe, tmp_path):
    evaluator = evaluator_of(moe, tmp_path, batch_tokens=128)
    batches = evaluator.tasks[0].prompt_batches("search", trees=moe.reads_trees)
    counts = torch.cat([one.counts.reshape(-1) for one in batches])
    assert (counts == 0).any() and (counts > 1).any() == moe.reads_trees, "no padding, or nothing shared"
    expected = brute_force.input_norms(moe.language_model, [moe.tokenizer(one)["input_ids"] for one in PROMPTS])
    assert_norms(observe_input_norms(evaluator), expected)


def test_the_size_of_batches_changes_nothing(moe, tmp_path):
    first = observe_input_norms(evaluator_of(moe, tmp_path / "long", batch_tokens=1000))
    other = observe_input_norms(evaluator_of(moe, tmp_path / "short", ROWS[::-1], batch_tokens=1))
    assert_norms(first, [vars(layer) for layer in other])  # some routers compute in float32


def test_a_model_whose_numbers_overflow_is_refused(tmp_path):
    model = tiny_model("mixtral", vocab_size=350)
    model.model.layers[1].mlp.experts.gate_up_proj.data[:] = torch.inf
    evaluator = evaluator_of(MoEModel(model, tiny.tiny_tokenizer(bos=True)), tmp_path)
    with pytest.raises(ModelError, match=r"^MoE layer 1: what enters its experts is not finite; load[^\n]*$"):
        observe_input_norms(evaluator)


def test_padding_that_holds_no_number_changes_nothing(moe, tmp_path):
    expected = observe_input_norms(evaluator_of(moe, tmp_path / "clean", batch_tokens=128))
    evaluator = evaluator_of(moe, tmp_path / "padded", batch_tokens=128)
    with spoilt_padding(evaluator):
        found = observe_input_norms(evaluator)
    assert_norms(found, [vars(layer) for layer in expected])


def test_the_model_is_left_as_it_was(moe, tmp_path):
    untouched = logits(moe.language_model, tokens())
    observe_input_norms(evaluator_of(moe, tmp_path))
    assert torch.equal(logits(moe.language_model, tokens()), untouched)


def test_the_zeros_are_where_size_times_input_norm_is_smallest(moe, tmp_path):
    norms = observe_input_norms(evaluator_of(moe, tmp_path))
    expected = brute_force.input_norms(moe.language_model, [moe.tokenizer(one)["input_ids"] for one in PROMPTS])
    done = compressed_experts(moe, RouterWeightedPruning(0.5), norms)
    for layer, stacked, of_layer in zip(moe.layers, done.layers, expected, strict=True):
        old, new = (expert_matrices(layer.experts, one) for one in (layer.expert_tensors(), stacked))
        for name, entering in (("gate", "hidden"), ("up", "hidden"), ("down", "inner")):
            for expert, (before, after) in enumerate(zip(old[name].numpy(), new[name].numpy(), strict=True)):
                norm = of_layer[entering][expert] if of_layer["tokens"][expert] else 1.0
                scores = np.abs(before) * norm
                kept = np.zeros(before.shape, dtype=bool)
                np.put_along_axis(kept, np.argsort(scores, axis=1)[:, before.shape[1] // 2 :], True, axis=1)
                np.testing.assert_array_equal(after, np.where(kept, before, 0))

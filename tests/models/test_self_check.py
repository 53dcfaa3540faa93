"""What is tried of a model when it is loaded: a changed contract is refused, or its part is switched off and told."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_tasks as tiny
import torch
from tiny_models import VARIANTS, tiny_model, variant

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.errors import ModelError
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.population import Evaluation
from moe_evo.models import self_check as self_check_module
from moe_evo.models.agreement import disagreement
from moe_evo.models.self_check import self_check
from moe_evo.models.transformers_border import (
    attention_implementation,
    eager_experts,
    gated,
    is_own_defect,
    kept_in_float32,
    undivided_modules,
)
from moe_evo.models.view import MoEModel


@pytest.fixture
def mixtral() -> MoEModel:
    return MoEModel(tiny_model("mixtral"))


def test_self_check_names_family_and_version_when_the_contract_changes(
    mixtral: MoEModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    router_class = type(mixtral.layers[0].router)
    original = router_class.forward

    def other_order(self, hidden):
        scores, weights, index = original(self, hidden)
        return scores, weights, index.flip(0)  # what a new release might do when called another way

    with monkeypatch.context() as patch:
        for layer in mixtral.layers:
            patch.setattr(layer.router, "forward", layer.router.forward, raising=False)
        patch.setattr(router_class, "forward", other_order)
        where = r"self-check of mixtral with transformers \d+\.\d+.* computes something else"
        with pytest.raises(ModelError, match=where):
            self_check(mixtral)
    self_check(mixtral)


def test_self_check_reports_code_that_no_longer_runs(mixtral: MoEModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_evo.models import layer as layer_module

    monkeypatch.setattr(layer_module, "exported_route", lambda *_: (None, None))
    with pytest.raises(ModelError, match=r"self-check of mixtral .*ValueError: not enough values"):
        self_check(mixtral)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_passes_with_nothing_switched_off(name: str) -> None:
    moe = MoEModel(variant(name))
    self_check(moe)
    assert moe.reads_trees and not moe.switched_off


attend = torch.nn.functional.scaled_dot_product_attention


def blind_attention(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> torch.Tensor:
    """As a kernel that knows no other mask than the causal one: in a tree only the second branch is wrong."""
    options["is_causal"] = query.shape[2] > 1
    return attend(query, key, value, attn_mask=None, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_wrong_branch_is_noticed_in_16_bits(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = MoEModel(tiny_model(name).to(dtype))
    self_check(moe)
    assert moe.reads_trees and not moe.switched_off
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", blind_attention)
    self_check(moe)
    assert not moe.reads_trees


def test_trees_that_attention_reads_otherwise_are_switched_off_and_scores_stay(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [{"prompt": f"one two three {n}", "choices": [" yes", " no no"], "label": n % 2} for n in range(6)]

    def score() -> tuple[Evaluator, Evaluation]:
        moe = MoEModel(tiny.tiny_mixtral(), tiny.tiny_tokenizer(bos=True))
        self_check(moe)
        task = tiny.make_task(tmp_path / "choice", data, moe.tokenizer, metric="log_likelihood")
        evaluator = Evaluator(moe, [task], EvaluationConfig())
        outcome = evaluator.evaluate([None], "search")[0]
        assert isinstance(outcome, Evaluation)
        return evaluator, outcome

    _, expected = score()
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", blind_attention)
        moe = MoEModel(tiny.tiny_mixtral())
        self_check(moe)
    (told,) = map(str, moe.switched_off)
    assert not moe.reads_trees
    assert told.startswith("self-check: no token trees: rows that begin alike are read one by one, so time is lost and")
    assert "no score (logits differ by" in told
    monkeypatch.setattr(self_check_module, "_why_no_trees", lambda _: "as a test says")
    evaluator, found = score()
    assert found.fitness == pytest.approx(expected.fitness, abs=1e-5)
    assert [one.part for one in evaluator.switched_off] == ["token trees", "shared prefixes", "shared prompts"]


def test_attention_that_takes_no_masks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_evo.models.tree_masks._MASKED_ATTENTION", ())
    moe = MoEModel(tiny_model("mixtral"))
    self_check(moe)
    assert [str(one) for one in moe.switched_off] == [
        "self-check: no token trees: rows that begin alike are read one by one, so time is lost and no score "
        "(attention 'sdpa' takes no masks of our own)"
    ]


def test_a_slip_of_our_own_is_no_property_of_the_model(mixtral: MoEModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_evo.models.tree_masks.torch", None)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'arange'"):
        self_check(mixtral)


def test_an_error_is_ours_where_our_code_raised_it() -> None:
    def caught(call: Any, *arguments: Any, **more: Any) -> BaseException:
        with pytest.raises((TypeError, AttributeError, ValueError)) as told:
            call(*arguments, **more)
        return told.value

    assert is_own_defect(caught(disagreement, None, None, torch.float32))
    assert not is_own_defect(caught(torch.nn.Linear(2, 2), unknown=1))
    assert not is_own_defect(caught(int, "x"))


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (lambda model: attention_implementation(object()), "object has no _attn_implementation"),
        (lambda model: eager_experts(torch.nn.Linear(1, 1)), "Linear.forward has no __wrapped__"),
        (lambda model: gated(object(), torch.zeros(1)), "object has no _apply_gate"),
        (lambda model: kept_in_float32(object(), torch.bfloat16), "object has no _keep_in_fp32_modules_strict"),
        (lambda model: undivided_modules(object()), "object has no _no_split_modules"),
    ],
)
def test_a_name_that_the_library_no_longer_has_is_told_in_one_line(ask: Any, expected: str) -> None:
    line = rf"transformers \d+\.\d+.*: {expected}, where .* was expected; install the"
    with pytest.raises(ModelError, match=line) as told:
        ask(None)
    assert "\n" not in str(told.value)

"""What of a model may be shared is tried first: what fails is told in one line, and scores stay right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_tasks as tiny
from tiny_models import VARIANTS, random_pruning, tiny_model, variant

from moe_evo import versions
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.run import ScoringConfig
from moe_evo.config.task import TaskConfig
from moe_evo.evaluation.engine.sharing import sharing_for
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.population import Evaluation
from moe_evo.models.forward import key_values, layer_halves
from moe_evo.models.ranks import Ranks
from moe_evo.models.source import ModelSource
from moe_evo.models.view import MoEModel
from moe_evo.runs.open_pool import open_pool
from moe_evo.tasks.data import check_tasks

SHOTS = "one two three four five six " * 10
KINDS: dict[str, dict[str, Any]] = {"choice": {"metric": "log_likelihood"}, "write": {"max_new_tokens": 5}}


@pytest.fixture
def mixtral() -> MoEModel:
    return MoEModel(tiny_model("mixtral"))


def evaluator_of(folder: Path, kind: str, **options: Any) -> Evaluator:
    """Few-shot rows on the tiny model: a choice between answers, or answers to write."""
    answer = {"choices": [" yes", " no no"], "label": 0} if kind == "choice" else {"answers": ["one"]}
    data = [{"prompt": f"{SHOTS}{n}", **answer} for n in range(8)]
    moe = MoEModel(tiny.tiny_mixtral(), tiny.tiny_tokenizer(bos=True))
    return Evaluator(moe, [tiny.make_task(folder, data, moe.tokenizer, **KINDS[kind])], EvaluationConfig(**options))


def fitness(evaluator: Evaluator) -> list[float]:
    genomes = [None, random_pruning(evaluator.model.shape, 2), tiny.tiny_merge(evaluator.model.shape)]
    outcomes = evaluator.evaluate(genomes, "search")
    assert all(isinstance(one, Evaluation) for one in outcomes)
    return [one.fitness for one in outcomes]


Breakage = Callable[[pytest.MonkeyPatch], None]


def adding_up_to_something_else(patch: pytest.MonkeyPatch) -> None:
    mix = layer_halves.LayerHalves.mix
    patch.setattr(layer_halves.LayerHalves, "mix", lambda *given: mix(*given) * 1.01)


def refusing_a_half(patch: pytest.MonkeyPatch) -> None:
    """As where a release hands attention its input in another way."""
    patch.setattr(layer_halves, "_zero_attention", lambda *, tokens: None)


def with_an_unknown_cache_argument(patch: pytest.MonkeyPatch) -> None:
    """The model hands its layers no cache under any keyword, as where a release passes it in an object of its own."""
    patch.setattr(layer_halves, "_names_of_caches", lambda values: [])


def reading_a_beginning_otherwise(patch: pytest.MonkeyPatch) -> None:
    together = key_values.concatenated
    patch.setattr(key_values, "concatenated", lambda before, after: together((before[0], before[1] * 1.5), after))


def forgetting_the_beginning(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(key_values, "concatenated", lambda before, after: after)


def reading_a_cache_otherwise(patch: pytest.MonkeyPatch) -> None:
    """As where a release takes its own caches by another keyword."""
    stored = layer_halves.CacheNames
    patch.setattr(layer_halves, "CacheNames", lambda of_layers, of_model: stored(of_layers, of_model="unknown_cache"))


@pytest.mark.parametrize(
    ("breaks", "line"),
    [
        (
            adding_up_to_something_else,
            "no shared layers: every genome is run from the first layer on, so time is lost and no score (logits ",
        ),
        (
            refusing_a_half,
            "no shared layers: every genome is run from the first layer on, so time is lost and no score (TypeError: ",
        ),
        (
            with_an_unknown_cache_argument,
            "no shared prefixes: what all rows of a task begin with is read anew in every batch, so time is lost and "
            "no score (the model hands its decoder layers no cache by name)",
        ),
        (
            reading_a_beginning_otherwise,
            "no shared prefixes: what all rows of a task begin with is read anew in every batch, so time is lost and "
            "no score (logits differ by ",
        ),
        (
            forgetting_the_beginning,
            "no shared prefixes: what all rows of a task begin with is read anew in every batch, so time is lost and "
            "no score (RuntimeError: ",
        ),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_fails_is_told_in_one_line_and_scores_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, breaks: Breakage, line: str
) -> None:
    whole = evaluator_of(tmp_path / "task", kind)
    expected = fitness(whole)
    assert not whole.switched_off
    breaks(monkeypatch)
    broken = evaluator_of(tmp_path / "task", kind)
    told, *more = map(str, broken.switched_off)
    assert told.startswith(f"self-check: {line}") and "\n" not in told
    assert [one.part for one in broken.switched_off[1:]] == ["shared prompts"] * ("shared prefixes" in told)
    assert all("(they need shared prefixes)" in one for one in more)
    assert fitness(broken) == pytest.approx(expected, abs=1e-5)


def test_generation_reads_its_prompts_where_the_model_goes_on_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fitness(evaluator_of(tmp_path / "task", "write"))
    reading_a_cache_otherwise(monkeypatch)
    evaluator = evaluator_of(tmp_path / "task", "write")
    (told,) = map(str, evaluator.switched_off)
    assert told.startswith("self-check: no shared prompts: every genome reads the prompts itself before it generates")
    assert fitness(evaluator) == expected


@pytest.mark.parametrize(
    ("name", "other"),
    [("__init__", lambda self, *, config, length: None), ("update", lambda self, keys, values: (keys, values))],
)
def test_a_cache_with_other_arguments_is_no_defect_of_ours(
    mixtral: MoEModel, monkeypatch: pytest.MonkeyPatch, name: str, other: Any
) -> None:
    monkeypatch.setattr(key_values.StaticCache, name, other)
    sharing = sharing_for(mixtral, EvaluationConfig())
    assert sharing.engine is not None and not sharing.engine.reads_prompts
    (told,) = map(str, sharing.switched_off)
    assert "no shared prompts" in told and "(RuntimeError: transformers' StaticCache: " in told


def test_decoder_layers_that_return_tuples_share_nothing_and_it_is_told(
    mixtral: MoEModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a release whose model takes the first of what a layer returns: what stands in for a layer fails."""
    layers = mixtral.language_model.model.layers
    forward = type(layers[0]).forward
    monkeypatch.setattr(type(layers[0]), "forward", lambda *args, **kwargs: (forward(*args, **kwargs),))
    for layer in layers:
        layer.register_forward_hook(lambda module, given, returned: returned[0])
    sharing = sharing_for(mixtral, EvaluationConfig())
    (told,) = map(str, sharing.switched_off)
    assert sharing.engine is None and "no shared layers" in told and "(IndexError: " in told


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_shares_everything(name: str) -> None:
    sharing = sharing_for(MoEModel(variant(name)), EvaluationConfig())
    assert not sharing.switched_off and sharing.engine is not None
    assert sharing.engine.reads_shared_prefixes and sharing.engine.reads_prompts


def test_a_slip_of_our_own_is_no_property_of_the_model(mixtral: MoEModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_evo.evaluation.engine.traversal.size_class", None)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        sharing_for(mixtral, EvaluationConfig())


def test_an_engine_is_for_ranks_that_run_the_same_examples_and_want_it(mixtral: MoEModel) -> None:
    unwanted = sharing_for(mixtral, EvaluationConfig(share_layers=False))
    assert unwanted.engine is None and not unwanted.switched_off, "who asked for it knows"
    apart = sharing_for(MoEModel(mixtral.language_model, ranks=Ranks(0, 2), splits_examples=True), EvaluationConfig())
    assert apart.engine is None and "ranks run different examples" in str(apart.switched_off[0])
    engine = sharing_for(mixtral, EvaluationConfig(state_cache_gib=0.5, state_device="cpu")).engine
    assert engine is not None and engine.states.budget_bytes == 2**29


def test_weights_on_several_devices_share_no_beginnings_and_it_is_told(
    mixtral: MoEModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MoEModel, "is_spread", True)
    sharing = sharing_for(mixtral, EvaluationConfig())
    assert sharing.engine is not None and not sharing.engine.reads_shared_prefixes
    assert "(the weights lie on several devices)" in str(sharing.switched_off[0])
    assert "(they need shared prefixes)" in str(sharing.switched_off[1])


@pytest.fixture
def texts(tmp_path: Path) -> str:
    return str(tiny.write_splits(tmp_path / "texts", [{"text": f"one two {n}"} for n in range(3)]))


def messages_of(texts: str, **options: Any) -> Sequence[str]:
    """What a pool in this process tells of itself."""
    told: list[str] = []
    moe = MoEModel(tiny.tiny_mixtral(), tiny.tiny_tokenizer(bos=True))
    config = replace(ScoringConfig(tasks=[TaskConfig(data=texts)]), evaluation=EvaluationConfig(**options))
    with open_pool(
        config, ModelSource(config.model), check_tasks(config.tasks), SimpleNamespace(message=told.append), model=moe
    ):
        return told


def test_what_is_switched_off_is_told_when_a_pool_opens(texts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not messages_of(texts)
    adding_up_to_something_else(monkeypatch)
    (told,) = messages_of(texts)
    assert "every genome is run from the first layer on" in told
    assert not messages_of(texts, share_layers=False), "who asked for it knows"


def test_a_package_newer_than_the_tested_one_is_told_when_a_pool_opens(
    texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "tested_versions", lambda: {"locked": {"torch": "2.0.1", "numpy": "99.0"}})
    installed = versions.installed_version("torch")
    assert messages_of(texts) == [
        f"newer than tested: torch {installed} (tested: 2.0.1); if something breaks, {versions.ADVICE}"
    ]

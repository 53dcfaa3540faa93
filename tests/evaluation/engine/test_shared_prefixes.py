"""What rows begin with, read once: the engine against stock transformers on the whole rows, for every family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_tasks as tiny
import torch
from tiny_models import VARIANTS, random_merge, random_pruning, tiny_model, variant

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.evaluation.engine.engine import Engine
from moe_evo.evaluation.engine.generate import generate_together
from moe_evo.evaluation.engine.packing import ALL
from moe_evo.evaluation.engine.scoring import Scored
from moe_evo.evaluation.engine.states import StateCache
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation
from moe_evo.models.agreement import relative_difference
from moe_evo.models.forward import layer_halves
from moe_evo.models.view import MoEModel
from moe_evo.tasks.base import IGNORED, ForwardBatch, GenerateBatch
from moe_evo.tasks.batches import forward_batches, generate_batches
from moe_evo.tasks.examples import Example
from moe_evo.tasks.rows import BatchLimits, Row, TokenisedSplits

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
SHARED_PREFIX = tuple(RNG.integers(3, 96, 30).tolist())
OWN = [tuple(RNG.integers(3, 96, int(size)).tolist()) for size in RNG.integers(2, 12, 16)]
SHOTS = "one two three four five six " * 10
KINDS: dict[str, dict[str, Any]] = {
    "choice": {"metric": "log_likelihood"},
    "like": {"kind": "distillation"},
    "write": {"max_new_tokens": 5},
}


class Padding:
    """All that generation asks of a tokenizer where nothing is decoded."""

    pad_token_id, eos_token_id = 0, None
    all_special_ids: tuple[int, ...] = ()


@pytest.fixture(scope="module", params=VARIANTS)
def moe(request: pytest.FixtureRequest) -> MoEModel:
    return MoEModel(variant(request.param), Padding())


@pytest.fixture(scope="module")
def mixtral() -> MoEModel:
    return MoEModel(tiny_model("mixtral"), Padding())


def scored_rows() -> list[Row]:
    """Two answers an example behind the shared prefix, and one row that begins otherwise."""
    made = [
        Row(number, SHARED_PREFIX + own + answer, len(SHARED_PREFIX + own) - 1, ((0, answer),))
        for number, own in enumerate(OWN)
        for answer in ((11, 12), (15,))
    ]
    return [*made, Row(len(OWN), (7, 8, 9), 1, ((0, (9,)),))]


def scored_batches() -> Sequence[ForwardBatch]:
    """Rows that stand alone, so that a shared prefix saves what is worth a pass."""
    batches = forward_batches(scored_rows(), BatchLimits(80, 96, trees=False, shared_prefix=SHARED_PREFIX))
    assert {batch.shared_prefix for batch in batches} == {SHARED_PREFIX, ()} and len(batches) > 3
    return batches


def prompts() -> list[Row]:
    """Of several lengths behind the shared prefix, and one that begins otherwise."""
    tokens = [*(SHARED_PREFIX + own for own in OWN), (7, 8, 9, 10)]
    return [Row(number, some, len(some) - 1) for number, some in enumerate(tokens)]


def prompt_batches(shared_prefix: tuple[int, ...] | None = SHARED_PREFIX) -> Sequence[GenerateBatch]:
    return generate_batches(prompts(), BatchLimits(4096, 96, shared_prefix=shared_prefix), 6, "")


def population(moe: MoEModel) -> list[Genome]:
    """A pruning, a merge, the identity, and a child that keeps the pruning's first layers."""
    shape = moe.shape
    parent, merged = random_pruning(shape, 4, seed=1), random_merge(shape, 4)
    return [parent, merged, shape.identity(), Genome((*parent.layers[:-1], merged.layers[-1]))]


@torch.inference_mode()
def run(engine: Engine, batch: ForwardBatch, genomes: Sequence[Genome], **options: Any) -> list[torch.Tensor]:
    found: dict[int, Scored] = {}
    engine.run(batch, genomes, found.__setitem__, **options)
    return [found[number].logits for number in range(len(genomes))]


@pytest.mark.parametrize("gib", [0.0, 1.0])
@pytest.mark.parametrize("copies", [1, 4])
def test_logits_behind_a_shared_prefix_are_those_of_whole_rows(moe: MoEModel, copies: int, gib: float) -> None:
    engine = Engine(moe, StateCache(gib, CPU))
    genomes, made = population(moe), scored_rows()
    whole: dict[tuple[int, int], torch.Tensor] = {}
    for number, genome in enumerate(genomes):
        with moe.applied(genome) as language_model, torch.inference_mode():
            for place, row in enumerate(made):
                whole[number, place] = language_model(torch.tensor([row.tokens])).logits[0, row.start :]
    place_of = {(row.example, row.answers[0][1]): place for place, row in enumerate(made)}
    seen: Counter[int] = Counter()
    for _ in range(2):  # the second time from what is kept
        for batch in scored_batches():
            for number, logits in enumerate(run(engine, batch, genomes, copies=copies)):
                for index, example in enumerate(batch.examples.tolist()):
                    answer = batch.targets[index, :, 0]
                    place = place_of[example, tuple(answer[answer != IGNORED].tolist())]
                    got = logits[batch.positions[index][batch.scored[index]]]
                    assert relative_difference(got, whole[number, place]) <= 5e-6
                    seen[place] += 1
    assert seen == dict.fromkeys(range(len(made)), 2 * len(genomes))


def test_a_shared_prefix_is_read_once_a_beginning_whatever_the_number_of_batches(
    mixtral: MoEModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind = [batch for batch in scored_batches() if batch.shared_prefix]
    engine = Engine(mixtral, StateCache(1, CPU))
    parent, other = random_pruning(mixtral.shape, 4, seed=1), random_pruning(mixtral.shape, 4, seed=2)
    attended: Counter[int] = Counter()
    attend = layer_halves.LayerHalves.attend

    def counted(self: layer_halves.LayerHalves, stage: int, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        attended[stage] += hidden.shape[1] == len(SHARED_PREFIX)
        return attend(self, stage, hidden, *rest)

    monkeypatch.setattr(layer_halves.LayerHalves, "attend", counted)
    assert all(batch.input_ids.shape[1] < len(SHARED_PREFIX) for batch in behind) and len(behind) > 2
    for _ in range(2):
        for batch in behind:
            run(engine, batch, [parent])
    assert attended == {0: 1, 1: 1, 2: 1}
    child = Genome((parent.layers[0], other.layers[1], parent.layers[2]))
    for batch in behind:
        run(engine, batch, [child, parent])
    assert attended == {0: 1, 1: 1, 2: 2}
    engine.states.clear()
    for batch in behind:
        run(engine, batch, [child, parent, Genome((parent.layers[0], other.layers[1], other.layers[2]))])
    assert attended == {0: 2, 1: 2, 2: 4}  # what two of them begin with is read once


@torch.inference_mode()
def test_what_layers_read_of_prompts_is_what_a_cache_of_transformers_holds(moe: MoEModel) -> None:
    if getattr(moe.language_model.config, "sliding_window", None):
        pytest.skip("its cache forgets tokens")
    engine, genomes = Engine(moe, StateCache(1, CPU)), population(moe)
    for batch in prompt_batches():
        assert batch.prompt is not None and not batch.prompt.kept.any()
        for genome, layers in zip(genomes, engine.read(batch.prompt, genomes, copies=4), strict=True):
            with moe.applied(genome) as language_model:
                for number, (tokens, mask) in enumerate(zip(batch.input_ids, batch.attention_mask, strict=True)):
                    own = tokens[mask.bool()][None, :-1]
                    stock = language_model(own, use_cache=True)[engine.cache_names.of_model]
                    for (keys, values), layer in zip(layers, stock.layers, strict=True):
                        length = own.shape[1]
                        assert relative_difference(keys[number, :, :length], layer.keys[0]) <= 5e-6
                        assert relative_difference(values[number, :, :length], layer.values[0]) <= 5e-6


@torch.inference_mode()
@pytest.mark.parametrize("shared_prefix", [SHARED_PREFIX, ()])
def test_prompts_that_are_read_before_are_continued_as_stock_generate_does(
    moe: MoEModel, shared_prefix: tuple[int]
) -> None:
    engine, genomes = Engine(moe, StateCache(1, CPU)), population(moe)
    batches = prompt_batches(shared_prefix)
    firsts = {batch.prompt.shared_prefix for batch in batches if batch.prompt is not None}
    assert firsts == {shared_prefix, ()}
    answers = set()
    for batch in batches:
        stock = [generate_together(moe, None, batch, [genome], True, ALL)[0] for genome in genomes]
        for _ in range(2):  # the second time from what is kept
            together = generate_together(moe, engine, batch, genomes, True, ALL)
            for (expected, *_), (new, is_finite, *_) in zip(stock, together, strict=True):
                length = expected.shape[1]  # others may write on, while ended rows are filled up
                assert is_finite.all() and torch.equal(new[:, :length], expected) and not new[:, length:].any()
        answers |= {str(one.new.tolist()) for one in stock}
    assert len(answers) > len(batches)


@torch.inference_mode()
def test_what_genomes_have_in_common_is_read_once_before_they_generate(
    mixtral: MoEModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(mixtral, StateCache(1, CPU))
    (batch,) = generate_batches(prompts()[: len(OWN)], BatchLimits(4096, 96, shared_prefix=SHARED_PREFIX), 6, "")
    parent, other = random_pruning(mixtral.shape, 4, seed=1), random_pruning(mixtral.shape, 4, seed=2)
    passed: list[int] = []
    mix = layer_halves.LayerHalves.mix

    def counted(self: layer_halves.LayerHalves, stage: int, residual: torch.Tensor, *rest: Any) -> torch.Tensor:
        passed.append(stage)
        return mix(self, stage, residual, *rest)

    monkeypatch.setattr(layer_halves.LayerHalves, "mix", counted)
    generate_together(mixtral, engine, batch, [parent], True, ALL)
    assert sorted(passed) == [0, 0, 1, 1]  # of the shared prefix and of what follows; nothing asks for the last experts
    passed.clear()
    last = Genome((*parent.layers[:2], other.layers[2]))
    generate_together(mixtral, engine, batch, [last], True, ALL)
    assert passed == []
    generate_together(mixtral, engine, batch, [Genome((parent.layers[0], *other.layers[1:]))], True, ALL)
    assert passed == [1, 1]
    passed.clear()
    generate_together(mixtral, engine, batch, [other], False, ALL)
    generate_together(mixtral, engine, batch, [other], False, ALL)  # nothing but the shared prefix was kept
    assert sorted(passed) == [0, 0, 0, 1, 1, 1]


@torch.inference_mode()
def test_a_prompt_of_one_token_is_left_to_generate(mixtral: MoEModel) -> None:
    engine, genome = Engine(mixtral, StateCache(1, CPU)), random_pruning(mixtral.shape, 4)
    (batch,) = generate_batches([Row(0, (7,), 0), Row(1, (7, 8), 1)], BatchLimits(64, 96, shared_prefix=()), 6, "")
    assert batch.prompt is None
    (together,) = generate_together(mixtral, engine, batch, [genome], True, ALL)
    (expected,) = generate_together(mixtral, None, batch, [genome], True, ALL)
    assert together.new.tolist() == expected.new.tolist()


def few_shot(moe: MoEModel, folder: Path, kind: str, **config: Any) -> Evaluator:
    rows = [{"prompt": f"{n} yes {'no ' * (n % 4)}", "choices": [" yes", " no no"], "label": n % 2} for n in range(60)]
    rows = [{"prompt": row["prompt"], "answers": "yes"} if kind == "write" else row for row in rows]
    rows = [{"prompt": row["prompt"]} if kind == "like" else row for row in rows]
    task = tiny.make_task(folder, rows, moe.tokenizer, batch_tokens=128, prefix=SHOTS, **KINDS[kind])
    return Evaluator(moe, [task], EvaluationConfig(batch_tokens=128, **config))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_genomes_that_run_alone(tmp_path: Path, kind: str) -> None:
    moe = MoEModel(tiny.tiny_mixtral(), tiny.tiny_tokenizer(bos=True))
    genomes = [None, random_pruning(moe.shape, 2), tiny.tiny_merge(moe.shape)]
    evaluators = [few_shot(moe, tmp_path / kind, kind, share_layers=shares) for shares in (True, False)]
    found = [evaluator.evaluate(genomes, "search") for evaluator in evaluators]
    for one, other in zip(*found, strict=True):
        assert isinstance(one, Evaluation) and isinstance(other, Evaluation)
        assert one.fitness == pytest.approx(other.fitness, abs=1e-5)
    batches = [
        batch
        for part in evaluators[0]._batches.of("search", None, evaluators[0].batch_tokens)
        for one in part
        for batch in one.batches
    ]
    shared_prefixes = {(batch if isinstance(batch, ForwardBatch) else batch.prompt).shared_prefix for batch in batches}
    assert {len(shared_prefix) > 100 for shared_prefix in shared_prefixes} == {kind != "like"}, (
        "every token of `like` is scored"
    )


def test_a_model_whose_weights_lie_on_several_devices_gets_none() -> None:
    moe = MoEModel(tiny_model("mixtral"))
    assert not moe.is_spread and Engine(moe, StateCache(1, CPU)).reads_shared_prefixes
    head = moe.language_model.lm_head
    head.weight = torch.nn.Parameter(head.weight.to("meta"), requires_grad=False)  # as an offloaded one
    engine = Engine(moe, StateCache(1, CPU))
    assert (
        moe.is_spread
        and not engine.reads_shared_prefixes
        and engine.why_no_shared_prefixes == "the weights lie on several devices"
    )


def splits_of(*tokens: Sequence[int], start: int = -1) -> TokenisedSplits:
    """Rows whose last token is scored, or all from `start` on."""
    examples = [Example(f"line {number}", prompt="x") for number in range(len(tokens))]
    made = {id(example): tuple(some) for example, some in zip(examples, tokens, strict=True)}

    def rows(number: int, example: Example) -> list[Row]:
        some = made[id(example)]
        return [Row(number, some, start if start >= 0 else len(some) - 1)]

    return TokenisedSplits({"search": examples[::2], "test": examples[1::2]}, rows)


def test_the_shared_prefix_is_the_beginning_that_saves_the_most_tokens() -> None:
    first, second = tuple(range(10, 20)), tuple(range(20, 26))
    some = [(*first, number, 1) for number in range(4)]
    assert splits_of(*some).shared_prefix == first
    assert splits_of(*some, (5, 6), (7, 8)).shared_prefix == first  # a few begin otherwise
    assert splits_of(*some, *((*second, number) for number in range(8))).shared_prefix == second  # 7 * 6 > 3 * 10
    assert splits_of(*some, *((*first, 3, 3, number) for number in range(2))).shared_prefix == first
    assert splits_of(*some, start=4).shared_prefix == first[:4]  # what is scored stands behind it
    assert splits_of((1, 2), (3, 4)).shared_prefix == splits_of((1, 2)).shared_prefix == ()
    assert splits_of((1, 2, 3), (1, 2, 3), (1, 2, 3)).shared_prefix == (1, 2)


def test_what_the_choices_of_one_example_have_in_common_is_no_shared_prefix(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer(bos=True)
    data = [
        {"prompt": f"{SHOTS}{n} {'no ' * (60 if n == 3 else 2)}", "choices": [" yes", " no no", " dog cat"], "label": 0}
        for n in range(8)
    ]
    task = tiny.make_task(tmp_path / "t", data, tokenizer)
    length = len(task._scorings["test"].rows.shared_prefix)
    shots = len(tokenizer(SHOTS)["input_ids"])
    assert shots - 3 < length < shots + 3


def test_trees_get_wider_with_the_shared_prefix_so_that_the_keys_and_values_of_a_batch_are_bounded() -> None:
    long = tuple(RNG.integers(3, 96, 2000).tolist())
    made = [Row(number, (*long, *own, number), len(long) + len(own)) for number in range(40) for own in OWN]
    batches = forward_batches(made, BatchLimits(2048, 96, shared_prefix=long))
    assert {batch.shared_prefix for batch in batches} == {long}
    assert all(len(batch.input_ids) * len(long) <= 4 * 2048 for batch in batches)
    assert all(batch.input_ids.numel() + len(batch.input_ids) * 500 == batch.num_tokens <= 2048 for batch in batches)


def test_a_shared_prefix_that_saves_less_than_a_pass_costs_stays_in_the_trees() -> None:
    made = scored_rows()
    (batch,) = forward_batches(made, BatchLimits(4096, 96, shared_prefix=SHARED_PREFIX))
    assert batch.shared_prefix == ()
    (few,) = generate_batches(prompts()[:3], BatchLimits(4096, 96, shared_prefix=SHARED_PREFIX), 6, "")
    assert few.prompt is not None and few.prompt.shared_prefix == ()

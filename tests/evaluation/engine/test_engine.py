"""The engine against one full forward pass a genome, for every family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny_tasks as tiny
import torch
from tiny_models import VARIANTS, random_merge, random_pruning, tiny_model, variant

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.evaluation.engine.engine import Engine
from moe_evo.evaluation.engine.scoring import Scored
from moe_evo.evaluation.engine.states import State, StateCache
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.genome import Genome
from moe_evo.models.agreement import relative_difference
from moe_evo.models.forward import layer_halves
from moe_evo.models.view import MoEModel
from moe_evo.tasks.base import IGNORED, ForwardBatch
from moe_evo.tasks.batches import forward_batches
from moe_evo.tasks.rows import BatchLimits, Row

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=VARIANTS)
def moe(request: pytest.FixtureRequest) -> MoEModel:
    return MoEModel(variant(request.param))


@pytest.fixture(scope="module")
def mixtral() -> MoEModel:
    return MoEModel(tiny_model("mixtral"))


def rows() -> list[Row]:
    """Rows of which many begin alike: two prompts with answers each, a prefix of all, and one of its own."""
    rng = np.random.default_rng(0)
    prefix, first, second = (tuple(rng.integers(3, 96, size).tolist()) for size in (5, 9, 4))
    prompts = [prefix + first, prefix + first + second, (7, 8, 9), prefix]
    answers = [(11, 12, 13), (11, 14), (15,)]
    made = [
        Row(number, prompt + answer, len(prompt) - 1, ((0, answer),))
        for number, prompt in enumerate(prompts)
        for answer in answers
    ]
    return [made[place] for place in rng.permutation(len(made))]


def one_batch(**options: int | bool) -> ForwardBatch:
    (batch,) = forward_batches(rows(), BatchLimits(**{"batch_tokens": 4096, "vocabulary": 96, **options}))
    return batch


def population(moe: MoEModel) -> list[Genome]:
    """Prunings, merges, the identity, and children that differ from a pruning in one layer or the last."""
    shape = moe.shape
    parent, other, merged = random_pruning(shape, 4, seed=1), random_pruning(shape, 4, seed=2), random_merge(shape, 4)
    children = [
        Genome((*parent.layers[:layer], source.layers[layer], *parent.layers[layer + 1 :]))
        for layer in range(shape.num_layers)
        for source in (other, merged)
    ]
    wider = random_pruning(shape, 4, top_k=1, seed=3) if shape.min_kept_per_group == 1 else other
    return [parent, other, merged, shape.identity(), wider, *children]


@torch.inference_mode()
def plain(moe: MoEModel, batch: ForwardBatch, genome: Genome) -> torch.Tensor:
    with moe.applied(genome):
        return tiny.forward(moe.language_model, batch)


@torch.inference_mode()
def run(engine: Engine, batch: ForwardBatch, genomes: Sequence[Genome], **options: int | bool) -> list[torch.Tensor]:
    found: dict[int, Scored] = {}
    engine.run(batch, genomes, found.__setitem__, **options)
    return [found[number].logits for number in range(len(genomes))]


@pytest.mark.parametrize("copies", [1, 3, 100])
def test_logits_are_those_of_one_full_forward_pass_each(moe: MoEModel, copies: int) -> None:
    batch, genomes = one_batch(), population(moe)
    engine = Engine(moe, StateCache(1, CPU))
    for _ in range(2):  # with no states kept, then with all of them
        for genome, logits in zip(genomes, run(engine, batch, genomes, copies=copies), strict=True):
            assert relative_difference(logits, plain(moe, batch, genome)) <= 2e-6
    for genome in genomes:  # each alone, from what the others left
        assert relative_difference(run(engine, batch, [genome])[0], plain(moe, batch, genome)) <= 2e-6


def test_the_same_rows_in_the_same_batch_give_the_same_bits(moe: MoEModel) -> None:
    texts = [Row(number, tuple(range(3 + number, 13 + number)), 0) for number in range(4)]
    (batch,) = forward_batches(texts, BatchLimits(4096, 96, trees=False))  # every token is scored
    genome = random_pruning(moe.shape, 4)
    assert torch.equal(run(Engine(moe, StateCache(1, CPU)), batch, [genome])[0], plain(moe, batch, genome))


def logits_of_rows(batch: ForwardBatch, logits: torch.Tensor) -> dict[tuple[int, tuple[int, ...]], torch.Tensor]:
    """(scored positions, V) by example and answer."""
    found = {}
    for index, example in enumerate(batch.examples.tolist()):
        answer = batch.targets[index, :, 0]
        found[example, tuple(answer[answer != IGNORED].tolist())] = logits[batch.positions[index][batch.scored[index]]]
    return found


@pytest.mark.parametrize("trees", [False, True])
def test_every_row_has_the_logits_of_stock_transformers(moe: MoEModel, trees: bool) -> None:
    batch = one_batch(trees=trees)
    assert (batch.input_ids.numel() < sum(len(row.tokens) for row in rows())) == trees
    found = logits_of_rows(batch, plain(moe, batch, moe.shape.identity()))
    assert len(found) == len(batch.examples) == len(rows())
    for row in rows():
        with torch.inference_mode():
            expected = moe.language_model(input_ids=torch.tensor([row.tokens])).logits[0, row.start :]
        assert relative_difference(found[row.example, row.answers[0][1]], expected) <= 5e-6


def test_a_long_prefix_of_all_rows_takes_a_quarter_of_what_is_read_at_most() -> None:
    prefix = tuple(range(3, 93))
    made = [Row(number, (*prefix, 93 + number % 3, number, 5, 6), 93) for number in range(200)]
    batches = forward_batches(made, BatchLimits(100_000, 96))
    read = sum(int((batch.counts > 0).sum()) for batch in batches)
    trees = sum(len(batch.input_ids) for batch in batches)
    assert sum(len(batch.examples) for batch in batches) == 200
    own = read - trees * len(prefix)  # rows of their own are 18,800 tokens
    assert trees == math.ceil(own / (3 * len(prefix))) == 3 and read < 1200
    (one,) = forward_batches(made[:1], BatchLimits(100_000, 96))
    assert one.input_ids.shape == (1, 94)


def test_a_model_without_tree_masks_reads_rows(mixtral: MoEModel, monkeypatch: pytest.MonkeyPatch) -> None:
    genome, batch = random_pruning(mixtral.shape, 4), one_batch(trees=False)
    expected = plain(mixtral, batch, genome)
    monkeypatch.setattr(mixtral, "reads_trees", False)
    masks = mixtral.attention_masks(batch.position_ids, batch.ends, batch.counts)
    assert masks.shape == batch.input_ids.shape
    assert relative_difference(run(Engine(mixtral, StateCache(1, CPU)), batch, [genome])[0], expected) <= 5e-6


def test_a_child_starts_where_it_differs_from_its_parent(mixtral: MoEModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = one_batch()
    parent, other = random_pruning(mixtral.shape, 4, seed=1), random_pruning(mixtral.shape, 4, seed=2)
    engine = Engine(mixtral, StateCache(1, CPU))
    passed: list[tuple[int, int]] = []
    attended: list[int] = []
    mix, attend = layer_halves.LayerHalves.mix, layer_halves.LayerHalves.attend

    def counted_mix(self: layer_halves.LayerHalves, stage: int, state: torch.Tensor, *rest: Any) -> torch.Tensor:
        passed.append((stage, state[..., 0].numel()))
        return mix(self, stage, state, *rest)

    def counted_attend(self: layer_halves.LayerHalves, stage: int, *rest: Any) -> torch.Tensor:
        attended.append(stage)
        return attend(self, stage, *rest)

    monkeypatch.setattr(layer_halves.LayerHalves, "mix", counted_mix)
    monkeypatch.setattr(layer_halves.LayerHalves, "attend", counted_attend)
    run(engine, batch, [parent])
    whole, scored = batch.input_ids.numel(), int(batch.kept.sum())
    assert passed == [(0, whole), (1, whole), (2, scored)] and attended == [0, 1, 2]
    for layer in range(3):
        child = Genome((*parent.layers[:layer], other.layers[layer], *parent.layers[layer + 1 :]))
        passed.clear()
        attended.clear()
        run(engine, batch, [child])
        assert [stage for stage, _ in passed] == list(range(layer, 3))
        assert attended == list(range(layer + 1, 3))
    siblings = [Genome((parent.layers[0], *random_pruning(mixtral.shape, 4, seed=seed).layers[1:])) for seed in (5, 6)]
    engine.states.clear()
    passed.clear()
    run(engine, batch, siblings, copies=2)
    assert passed == [(0, whole), (1, 2 * whole), (2, 2 * scored)]


def test_states_keep_to_their_budget_and_the_least_recent_go_first() -> None:
    state = State(torch.zeros(128), ((torch.zeros(64), torch.zeros(64)),))  # 1 KiB
    cache = StateCache(3 / 2**20, CPU)
    for number in range(3):
        cache.keep("batch", (number,), state)
    assert cache.get("batch", (0,)) is not None
    cache.keep("batch", (3,), state)
    assert [cache.get("batch", (number,)) is not None for number in range(4)] == [True, False, True, True]
    assert cache.size_bytes == cache.budget_bytes and len(cache) == 3
    cache.keep("batch", (4,), State(torch.zeros(1024)))
    assert cache.get("batch", (4,)) is None and len(cache) == 3
    assert cache.longest("batch", (3, 7)) == 1 and cache.longest("other", (3, 7)) == cache.longest("batch", (3,)) == 0
    cache.clear()
    assert (len(cache), cache.size_bytes) == (0, 0)


def test_a_kept_part_does_not_hold_the_whole() -> None:
    cache = StateCache(1, CPU)
    whole = torch.zeros(4, 256)
    cache.keep("batch", (0,), State(whole[1:2], ((whole[2:3], whole[3:4]),)))
    kept = cache.get("batch", (0,))
    assert kept is not None
    assert [one.untyped_storage().nbytes() for one in (kept.residual, *kept.read[0])] == [1024] * 3


@pytest.mark.parametrize("gib", [0.0, 2e-5])
def test_without_room_for_states_scores_are_the_same(mixtral: MoEModel, gib: float) -> None:
    batch, genomes = one_batch(), population(mixtral)
    engine = Engine(mixtral, StateCache(gib, CPU))
    for genome in genomes:
        assert relative_difference(run(engine, batch, [genome])[0], plain(mixtral, batch, genome)) <= 2e-6
    assert engine.states.size_bytes <= engine.states.budget_bytes


def test_a_model_on_another_device_may_keep_states_in_host_memory(mixtral: MoEModel) -> None:
    states = StateCache(1, torch.device("meta"))
    states.keep("batch", (0,), State(torch.zeros(3), ((torch.zeros(1), torch.zeros(1)),)))
    kept = states.get("batch", (0,))
    assert kept is not None
    assert [one.device.type for one in (kept.residual, *kept.read[0])] == ["meta"] * 3


def test_on_the_cpu_scores_do_not_depend_on_company_unless_packing_is_asked_for(tmp_path) -> None:
    moe = MoEModel(tiny.tiny_mixtral(), tiny.tiny_tokenizer(bos=True))
    data = [{"prompt": f"one {n}", "choices": [" yes", " no no"], "label": n % 2} for n in range(6)]
    task = tiny.make_task(tmp_path / "choice", data, moe.tokenizer, metric="log_likelihood")
    genomes = [random_pruning(moe.shape, 2, seed=seed) for seed in range(5)]

    def fitness(together: bool, **options: int) -> list[float]:
        evaluator = Evaluator(moe, [task], EvaluationConfig(**options))
        requests = [genomes] if together else [[genome] for genome in genomes]
        return [one.fitness for request in requests for one in evaluator.evaluate(request, "search")]

    alone = fitness(together=False)
    assert fitness(together=True) == alone
    assert fitness(together=True, pack_tokens=4096) == pytest.approx(alone, abs=1e-5)


def test_evaluators_of_one_model_can_share_the_memory_for_states(tmp_path) -> None:
    moe = MoEModel(tiny.tiny_mixtral(), tiny.tiny_tokenizer(bos=True))
    tasks = [
        tiny.make_task(tmp_path / name, [{"text": f"{n} one {name}"} for n in "ab"], moe.tokenizer)
        for name in ("x", "y")
    ]
    first = Evaluator(moe, tasks[:1], EvaluationConfig(state_cache_gib=0.25))
    second = Evaluator(moe, tasks[1:], EvaluationConfig(), first.states)
    assert second.states is first.states and first.states is not None
    genome = random_pruning(moe.shape, 2)
    alone = [Evaluator(moe, [task], EvaluationConfig()).evaluate([genome], "search")[0].fitness for task in tasks]
    assert [one.evaluate([genome], "search")[0].fitness for one in (first, second)] == alone
    assert len(first.states) == 4  # two states a task


def test_genomes_that_generate_together_write_what_each_writes_alone(moe: MoEModel) -> None:
    prompts = torch.randint(3, 96, (3, 7), generator=torch.Generator().manual_seed(1))
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "attention_mask": torch.ones_like(prompts)}
    shape = moe.shape
    genomes = [
        random_pruning(shape, 4, seed=1),
        shape.identity(),
        random_merge(shape, 4),
        random_pruning(shape, 6, seed=2),
    ]
    alone = []
    for genome in genomes:
        with moe.applied(genome) as language_model, torch.inference_mode():
            alone.append(language_model.generate(prompts, **options))
    options["attention_mask"] = torch.ones(12, 7, dtype=torch.long)
    with moe.applied_together(genomes) as language_model, torch.inference_mode():
        together = language_model.generate(prompts.repeat(4, 1), **options)
    assert [part.tolist() for part in together.chunk(4)] == [one.tolist() for one in alone]
    assert len({str(one.tolist()) for one in alone}) > 1


def test_what_genomes_of_a_call_need_is_made_once_however_many_they_are(
    mixtral: MoEModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_evo.evaluation.engine.stages._MOST_PLANS", 2)
    made: list[object] = []
    plan = MoEModel.plan
    monkeypatch.setattr(MoEModel, "plan", lambda self, *given: made.append(given) or plan(self, *given))
    engine, genomes = Engine(mixtral, StateCache(0, CPU)), population(mixtral)
    genes = {(stage, gene) for genome in genomes for stage, gene in enumerate(genome.layers)}
    for _ in range(2):
        run(engine, one_batch(), genomes)
    assert len(made) == len(genes)
    run(engine, one_batch(), genomes[:1])
    run(engine, one_batch(), genomes[1:2])
    assert len(engine._stages._plans) == mixtral.shape.num_layers, "others made room"

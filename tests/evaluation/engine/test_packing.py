"""How many genomes go together where their speed decides: any clock will do, so the tests bring their own."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_tasks as tiny
import torch
from process_groups import run_gang
from tiny_models import random_merge, random_pruning

from moe_evo.cli.main import main
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.file import config_parser, parse_config
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import ScoringConfig
from moe_evo.config.task import TaskConfig
from moe_evo.errors import ConfigError
from moe_evo.evaluation.engine.packing import TRIES, MeasuredPacking
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation
from moe_evo.models.load import load_model
from moe_evo.models.ranks import ALONE, Ranks
from moe_evo.models.view import MoEModel
from moe_evo.tasks.data import read_task
from moe_evo.tasks.registry import build_task
from moe_evo.tasks.task import Task

PROMPTS = [f"{n} one two" for n in range(8)]


class Clock:
    """Stands still but for what is added to `now_s`."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def passes(
    packing: MeasuredPacking, clock: Clock, seconds: Mapping[int, float], at_hand: int, number: int, kind: Hashable = 0
) -> list[int]:
    """How many genomes go through each of so many passes that take so many seconds a genome."""
    together = []
    for _ in range(number):
        together.append(packing.together(kind, at_hand))
        with packing.timed(kind, together[-1]):
            clock.now_s += seconds[together[-1]] * together[-1]
    return together


def test_it_goes_up_while_that_is_faster_and_stays_where_it_is_not() -> None:
    clock = Clock()
    packing = MeasuredPacking(ALONE, clock)
    found = passes(packing, clock, {1: 1.0, 2: 0.7, 4: 0.6, 8: 0.61}, at_hand=100, number=6 * TRIES + 4)
    assert found == [1, 2] * TRIES + [2, 4] * TRIES + [4, 8] * TRIES + [4] * 4
    assert packing.together(0, 3) == 3 and packing.together(0, 5) == 4 and packing.fastest == {0: 4}


def test_one_at_a_time_stays_where_two_are_no_faster() -> None:
    clock = Clock()
    packing = MeasuredPacking(ALONE, clock)
    assert passes(packing, clock, {1: 1.0, 2: 0.99}, 64, 10)[2 * TRIES :] == [1] * (10 - 2 * TRIES)


def test_one_pass_that_is_slow_once_does_not_decide() -> None:
    clock = Clock()
    packing = MeasuredPacking(ALONE, clock)
    passes(packing, clock, {1: 1.0, 2: 90.0}, 2, 2)
    assert passes(packing, clock, {1: 1.0, 2: 0.5}, 2, 2 * TRIES)[-1] == 2


def test_no_more_go_together_than_are_at_hand_and_more_are_tried_when_they_are() -> None:
    clock = Clock()
    packing = MeasuredPacking(ALONE, clock)
    seconds = {number: 1 / number for number in (1, 2, 3, 4, 8, 16)}
    assert set(passes(packing, clock, seconds, 1, 20)) == {1}
    assert max(passes(packing, clock, seconds, 3, 20)) == 2
    assert passes(packing, clock, seconds, 16, 50)[-1] == 16
    assert passes(packing, clock, seconds, 4, 1) == [4]


def test_kinds_of_passes_are_measured_apart() -> None:
    clock = Clock()
    packing = MeasuredPacking(ALONE, clock)
    passes(packing, clock, {1: 1.0, 2: 0.5}, 2, 20, kind="small")
    passes(packing, clock, {1: 1.0, 2: 1.5}, 2, 20, kind="large")
    assert packing.fastest == {"small": 2, "large": 1}


def population(moe: MoEModel, merges: int = 12) -> list[Genome]:
    prunings = [random_pruning(moe.shape, 2, seed=seed) for seed in range(12)]
    return list(dict.fromkeys([*prunings, *(random_merge(moe.shape, 2, seed=seed) for seed in range(merges))]))


def tasks_of(folder: Path, moe: MoEModel, *kinds: str) -> list[Task]:
    rows = {
        "texts": [{"text": prompt} for prompt in PROMPTS],
        "write": [{"prompt": prompt, "answers": "x"} for prompt in PROMPTS],
    }
    options: dict[str, dict[str, Any]] = {"texts": {}, "write": {"max_new_tokens": 3}}
    return [tiny.make_task(folder / kind, rows[kind], moe.tokenizer, **options[kind]) for kind in kinds]


def tick(moe: MoEModel, clock: Clock, least: float) -> list[int]:
    """Let every pass through a layer take `least` seconds and one for each tree; returns their numbers of trees."""
    sizes: list[int] = []

    def measure(layer: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        sizes.append(len(given[0]))
        clock.now_s += least + len(given[0])

    for layer in moe.language_model.model.layers:
        layer.register_forward_pre_hook(measure)
    return sizes


@pytest.mark.parametrize("kind", ["texts", "write"])
def test_what_is_measured_decides_how_many_genomes_go_together_with_the_same_scores(tmp_path: Path, kind: str) -> None:
    def outcomes(together: bool, **options: Any) -> tuple[list[Evaluation], list[int], dict[Hashable, int]]:
        moe, clock = MoEModel(tiny.tiny_mixtral(), tiny.tiny_tokenizer(bos=True)), Clock()
        evaluator = Evaluator(moe, tasks_of(tmp_path, moe, kind), EvaluationConfig(**options), clock=clock)
        sizes = tick(moe, clock, 1000.0 if together else 0.0)
        found = evaluator.evaluate(population(moe, merges=80), "search")
        assert all(isinstance(outcome, Evaluation) for outcome in found)
        return found, sizes, getattr(evaluator._packing, "fastest", {})

    alone, single, _ = outcomes(together=True)
    whole, most, _ = outcomes(together=True, pack_tokens=8192)
    fast, grown, fastest = outcomes(together=True, pack_tokens="measured")
    slow, tried, stayed = outcomes(together=False, pack_tokens="measured")
    assert max(fastest.values()) >= 8 and set(stayed.values()) == {1}
    assert max(tried) == 2 * max(single) < max(grown) <= max(most)
    for found in (whole, fast, slow):
        for one, other in zip(found, alone, strict=True):
            assert one.fitness == pytest.approx(other.fitness, rel=1e-6, abs=1e-6)
            assert dict(one.metrics) == pytest.approx(dict(other.metrics), rel=1e-6, abs=1e-6)


def test_what_does_not_fit_in_memory_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moe, clock = MoEModel(tiny.tiny_mixtral(), tiny.tiny_tokenizer(bos=True)), Clock()
    tasks = tasks_of(tmp_path, moe, "texts")
    expected = Evaluator(moe, tasks, EvaluationConfig()).evaluate(population(moe, merges=80), "search")
    sizes = tick(moe, clock, 1000.0)
    layer, (batch,) = moe.language_model.model.layers[1], tasks[0].batches("search")
    forward, most_tokens = layer.forward, 4 * batch.num_tokens
    refused: list[int] = []

    def limited(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if hidden[..., 0].numel() > most_tokens:
            refused.append(hidden[..., 0].numel())
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return forward(hidden, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", limited)
    evaluator = Evaluator(moe, tasks, EvaluationConfig(pack_tokens="measured"), clock=clock)
    found = evaluator.evaluate(population(moe, merges=80), "search")
    assert [one.fitness for one in found] == pytest.approx([one.fitness for one in expected], rel=1e-6)
    assert refused and evaluator.batch_tokens < 8 * batch.num_tokens
    sizes.clear()
    refused.clear()
    others = [random_merge(moe.shape, 2, seed=seed) for seed in range(100, 120)]
    evaluator.evaluate(others, "search")
    assert max(sizes) == 4 * len(batch.input_ids) and not refused


def test_on_the_cpu_nothing_is_measured_unless_it_is_asked_for(tmp_path: Path) -> None:
    moe = MoEModel(tiny.tiny_mixtral(), tiny.tiny_tokenizer(bos=True))
    tasks = tasks_of(tmp_path, moe, "texts", "write")

    def clock() -> float:
        raise AssertionError("nobody should ask")

    for options in ({}, {"pack_tokens": 64}):
        Evaluator(moe, tasks, EvaluationConfig(**options), clock=clock).evaluate(population(moe), "search")
    with pytest.raises(AssertionError, match="nobody"):
        Evaluator(moe, tasks, EvaluationConfig(pack_tokens="measured"), clock=clock).evaluate(population(moe), "search")


def packed_by_rank(ranks: Ranks, folder: str, sharding: str) -> tuple[list[float], dict[Hashable, int]]:
    """Fitness and choices on a rank whose clock is quick with large packs on rank 0, and with small ones on others."""
    moe = load_model(ModelConfig(path=f"{folder}/model", device="cpu", sharding=sharding), ranks)
    clock = Clock()
    tick(moe, clock, 1000.0 if ranks.rank == 0 else 0.0)
    names = ("texts", "write") if sharding == "tensor_parallel" else ("write",)
    data = [read_task(TaskConfig(data=f"{folder}/{name}", name=name, max_new_tokens=3)) for name in names]
    config = EvaluationConfig(batch_tokens=2048, pack_tokens="measured")
    evaluator = Evaluator(moe, [build_task(one, moe.tokenizer, 64) for one in data], config, clock=clock)
    genomes = population(moe)
    outcomes = [one for part in (genomes[:16], genomes[16:]) for one in evaluator.evaluate(part, "search")]
    return [fitness_of(outcome) for outcome in outcomes], evaluator._packing.fastest


def packed_apart(ranks: Ranks, folder: str, pack_tokens: int) -> list[float]:
    moe = load_model(ModelConfig(path=f"{folder}/model", device="cpu", sharding="zero3"), ranks)
    task = build_task(read_task(TaskConfig(data=f"{folder}/write", max_new_tokens=3)), moe.tokenizer, 64)
    evaluator = Evaluator(moe, [task], EvaluationConfig(pack_tokens=pack_tokens))
    return [fitness_of(outcome) for outcome in evaluator.evaluate(population(moe)[:6], "search")]


def fitness_of(outcome: object) -> float:
    assert isinstance(outcome, Evaluation), outcome
    return outcome.fitness


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and prompts of which every second one is long, so that ranks have batches of other sizes."""
    root = tmp_path_factory.mktemp("packing")
    tiny.tiny_mixtral().save_pretrained(root / "model")
    tiny.tiny_tokenizer(bos=True).save_pretrained(root / "model")
    prompts = [f"{n} one" + " two three" * (n % 2) for n in range(8)]
    tiny.write_splits(root / "texts", [{"text": prompt} for prompt in prompts])
    tiny.write_splits(root / "write", [{"prompt": prompt, "answers": "x"} for prompt in prompts])
    return root


@pytest.mark.parametrize("sharding", ["tensor_parallel", "zero3"])
def test_ranks_pack_alike_as_the_first_one_measures(folder: Path, sharding: str) -> None:
    (fitness, fastest), (others, chosen) = run_gang(packed_by_rank, 2, str(folder), sharding)
    assert fastest == chosen and fitness == others
    assert max(fastest.values()) >= 2  # where the clock of the other rank had decided: 1


def test_ranks_with_prompts_of_other_lengths_generate_equally_often(folder: Path) -> None:
    alone, together = (run_gang(packed_apart, 2, str(folder), tokens) for tokens in (1, 100))
    assert alone[0] == alone[1] == together[0] == together[1]


@pytest.mark.parametrize(("word", "expected"), [("measured", "measured"), ("512", 512), ("null", None)])
def test_the_command_line_takes_a_number_or_measured(word: str, expected: object) -> None:
    parser = config_parser("evaluate", "", "", ScoringConfig)
    config = parse_config(parser, ["--evaluation.pack_tokens", word], ScoringConfig)[1]
    assert config.evaluation.pack_tokens == expected


@pytest.mark.parametrize("value", ["fast", 0, -3, ""])
def test_other_packings_are_refused_in_one_line(value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"^evaluation\.pack_tokens: got .*, expected 1 or more, or 'measured'$"):
        EvaluationConfig(pack_tokens=value)
    assert main(["search", "--evaluation.pack_tokens", str(value)]) == 2
    message = capsys.readouterr().err
    assert "evaluation.pack_tokens" in message and message.count("\n") == 1

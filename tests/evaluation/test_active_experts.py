"""The mean number of experts that a token runs, against rows that run alone, whatever genomes and rows share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_tasks as tiny
import torch
from process_groups import run_gang
from tiny_models import random_pruning

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation, mean_active_experts
from moe_evo.models.experts.outputs import observed_experts
from moe_evo.models.load import load_model
from moe_evo.models.ranks import ALONE, Ranks
from moe_evo.models.source import ModelSource
from moe_evo.models.variants.dynamic_routing import DynamicRouting, Skipping, TopP
from moe_evo.models.view import MoEModel
from moe_evo.tasks.task import Task

SHOTS = "yes no dog cat " * 12
KINDS: dict[str, dict[str, Any]] = {
    "choice": {"prefix": SHOTS},
    "write": {"prefix": SHOTS, "max_new_tokens": 6, "stop": "e"},
    "texts": {},
}
RULES = {"top-p": TopP(0.6), "skipping": Skipping(0.6)}
OPTIONS: Mapping[str, dict[str, Any]] = {
    "shared": {},
    "packed": {"pack_tokens": 4096},
    "no states": {"state_cache_gib": 0.0},
    "alone": {"share_layers": False},
}


def make_task(moe: MoEModel, folder: Path, kind: str) -> Task:
    rows: list[dict[str, Any]] = [{"prompt": f"{n} yes {'no ' * (n % 4)}"} for n in range(8)]
    for n, row in enumerate(rows):
        row |= {"choices": [" yes", " no no"], "label": n % 2} if kind == "choice" else {"answers": "yes"}
    if kind == "texts":
        rows = [{"text": f"{n} one two three {'no ' * (n % 4)}"} for n in range(12)]
    return tiny.make_task(folder / kind, rows, moe.tokenizer, batch_tokens=400, **KINDS[kind])


def tiny_moe(rule: DynamicRouting | None) -> MoEModel:
    return MoEModel(tiny.tiny_mixtral(), tiny.tiny_tokenizer(bos=True), dynamic_routing=rule)


def population(moe: MoEModel) -> list[Genome | None]:
    parent, merged = random_pruning(moe.shape, 3), tiny.tiny_merge(moe.shape)
    return [None, parent, merged, Genome((parent.layers[0], merged.layers[1]))]


@torch.inference_mode()
def run_alone(moe: MoEModel, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (T, V) of one sequence, and by the gates that the experts get how many each token runs (T,)."""
    active = torch.zeros(len(tokens))

    def see(_layer, _index, gates, _outputs):
        active.add_((gates != 0).sum(dim=-1))

    with observed_experts(moe, see):
        logits = moe.language_model(input_ids=torch.tensor([tokens])).logits[0]
    return logits, active


def written(moe: MoEModel, tokens: list[int]) -> tuple[list[int], list[float]]:
    """New tokens up to the stop text or an end token, and how many experts ran for each, without a cache."""
    new: list[int] = []
    active: list[float] = []
    end = moe.language_model.generation_config.eos_token_id
    while len(new) < 6 and "e" not in moe.tokenizer.decode(new, skip_special_tokens=True) and end not in new:
        logits, found = run_alone(moe, tokens + new)
        active.append(float(found[-1]))
        new.append(int(logits[-1].argmax()))
    return new, active


def rows_of(task: Task) -> list[list[int]]:
    examples = enumerate(task._splits["search"])
    return [list(row.tokens) for number, example in examples for row in task.scorer.rows(number, example)]


def end_rows_now_and_then(moe: MoEModel, task: Task) -> None:
    """Make a token that is written before others an end token."""
    second = Counter(token for tokens in rows_of(task) for token in written(moe, tokens)[0][1:4])
    moe.language_model.generation_config.eos_token_id = second.most_common(1)[0][0]
    lengths = {len(written(moe, tokens)[0]) for tokens in rows_of(task)}
    assert len(lengths) > 1


def expected(moe: MoEModel, task: Task, kind: str, genome: Genome | None) -> float:
    active: list[float] = []
    with moe.applied(genome or moe.shape.identity()):
        for number, example in enumerate(task._splits["search"]):
            for row in task.scorer.rows(number, example):
                tokens = list(row.tokens)
                is_written = kind == "write"
                active += written(moe, tokens)[1] if is_written else run_alone(moe, tokens)[1][row.start :].tolist()
    return sum(active) / len(active) / moe.shape.num_layers


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_that_of_the_scored_positions_of_rows_that_run_alone(tmp_path: Path, kind: str, rule: str) -> None:
    moe = tiny_moe(RULES[rule])
    task, genomes = make_task(moe, tmp_path, kind), population(moe)
    if kind == "write":
        end_rows_now_and_then(moe, task)
    wanted = [expected(moe, task, kind, genome) for genome in genomes]
    assert len(set(wanted)) > 2 and all(1 < one < 2 for one in wanted)
    fitness = {}
    for name, options in OPTIONS.items():
        evaluator = Evaluator(moe, [task], EvaluationConfig(batch_tokens=400, **options))
        assert evaluator.shares_layers == (name != "alone") and not evaluator.switched_off
        for again in range(2):  # the second time from what is kept
            outcomes = evaluator.evaluate(genomes, "search")
            found = [outcome.metrics[f"{task.name}/active_experts"] for outcome in outcomes]
            assert found == pytest.approx(wanted, abs=1e-9), (name, again)
        fitness[name] = [outcome.fitness for outcome in outcomes]
        assert fitness[name] == pytest.approx(fitness["shared"], abs=1e-5)


def test_rows_that_share_no_tokens_have_the_same_one(tmp_path: Path) -> None:
    moe = tiny_moe(TopP(0.6))
    task, genomes = make_task(moe, tmp_path, "choice"), population(moe)
    found = []
    for trees in (True, False):
        moe.reads_trees = trees
        found.append(Evaluator(moe, [task], EvaluationConfig()).evaluate(genomes, "search"))
    for one, other in zip(*found, strict=True):
        assert one.metrics == pytest.approx(other.metrics, abs=1e-5)


def test_without_dynamic_routing_it_is_not_told(tmp_path: Path) -> None:
    moe = tiny_moe(None)
    for kind in KINDS:
        task = make_task(moe, tmp_path, kind)
        (outcome,) = Evaluator(moe, [task], EvaluationConfig()).evaluate([None], "search")
        assert isinstance(outcome, Evaluation) and mean_active_experts(outcome.metrics) is None
        assert not any("active" in name for name in outcome.metrics)


def test_of_several_tasks_the_mean_is_told() -> None:
    assert mean_active_experts({"a/active_experts": 1.0, "b/active_experts": 2.0, "b/accuracy": 0.5}) == 1.5


def outcomes_of(ranks: Ranks, folder: str, sharding: str) -> list[dict[str, float]]:
    config = ModelConfig(path=f"{folder}/model", device="cpu", sharding=sharding, self_check=False, top_p=0.6)
    moe = load_model(ModelSource(config), ranks)
    tasks = [make_task(moe, Path(folder) / f"of {ranks.rank} {sharding}", kind) for kind in KINDS]
    outcomes = Evaluator(moe, tasks, EvaluationConfig(batch_tokens=400)).evaluate(population(moe), "search")
    return [dict(outcome.metrics) for outcome in outcomes]


@pytest.mark.parametrize("sharding", ["tensor_parallel", "zero3"])
def test_ranks_together_tell_what_one_process_tells(sharding: str, tmp_path: Path) -> None:
    tiny.tiny_mixtral().save_pretrained(tmp_path / "model")
    tiny.tiny_tokenizer(bos=True).save_pretrained(tmp_path / "model")
    wanted = outcomes_of(ALONE, str(tmp_path), "single")
    assert all(1 < one["write/active_experts"] < 2 for one in wanted)
    for of_rank in run_gang(outcomes_of, 2, str(tmp_path), sharding):
        for got, one in zip(of_rank, wanted, strict=True):
            assert got == pytest.approx(one, rel=1e-4, abs=1e-4)

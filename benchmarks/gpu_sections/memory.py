"""Does an evaluation still end, with the same scores, where memory runs out?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from gpu_sections.bench import Bench
from gpu_sections.made_models import choice_task, dense_merge, made_up_data, prunings
from gpu_sections.record import Record, free_memory
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation
from moe_evo.models.view import MoEModel
from moe_evo.tasks.task import Task

LIMITS_GIB = (4.0, 1.5)  # beside the model
BATCH_TOKENS = 32768


def out_of_memory(bench: Bench, record: Record) -> None:
    """Three prunings and a merge, with all of the card, and with ever less of it."""
    model = bench.models.get("olmoe")
    (folder := bench.folder / "out_of_memory").mkdir()
    data = made_up_data(folder, 24 if bench.is_small else 256, words=8 if bench.is_small else 24)
    task = choice_task(data, model, BATCH_TOKENS)
    genomes = [*prunings(model, 3), dense_merge(model)]
    expected: list[Evaluation] = []
    record.attempt("no limit", partial(_evaluated, model, task, genomes, None, expected))
    for gib in LIMITS_GIB:
        for fits in (True, False):
            caches = "caches that fit" if fits else "caches that do not"
            point = f"{gib} GiB beside the model, {caches}"
            if not bench.on_gpu:
                record.skip(point, "only a GPU's memory can be limited")
            elif len(expected) != len(genomes):
                record.skip(point, "there are no scores to compare with")
            else:
                record.attempt(point, partial(_limited, model, task, genomes, gib, fits, expected))


def _limited(
    model: MoEModel, task: Task, genomes: Sequence[Genome], gib: float, fits: bool, expected: list[Evaluation]
) -> dict[str, Any]:
    """fits: half of the limit is for merged layers, a quarter for states; else all that a whole card would have."""
    model.merged_cache.clear()
    model.merged_cache.budget_bytes = int(gib / 2 * 2**30) if fits else 2**35
    with at_most(model.device, gib):
        return _evaluated(model, task, genomes, gib / 4 if fits else 16.0, expected)


def _evaluated(
    model: MoEModel, task: Task, genomes: Sequence[Genome], states_gib: float | None, expected: list[Evaluation]
) -> dict[str, Any]:
    """One after the other, as a search asks. Without `expected` outcomes to compare with, fills them in.

    same_scores: share of examples with the same score. tie_break: largest difference, in nats.
    """
    config = EvaluationConfig(batch_tokens=BATCH_TOKENS, state_cache_gib=states_gib)
    evaluator = Evaluator(model, [task], config)
    outcomes = [evaluator.evaluate([genome], "search")[0] for genome in genomes]
    found = [outcome for outcome in outcomes if isinstance(outcome, Evaluation)]
    assert len(found) == len(genomes), outcomes
    figures: dict[str, Any] = {
        "batch_tokens": evaluator.batch_tokens,
        "shares_layers": evaluator.shares_layers,
        "s": sum(one.duration_s for one in found),
        "fitness": found[0].fitness,
    }
    if not expected:
        expected.extend(found)
        return figures
    pairs = list(zip(found, expected, strict=True))
    return figures | {
        "same_scores": float(np.mean([np.mean(_scores(one) == _scores(other)) for one, other in pairs])),
        "tie_break": max(abs(one.tie_break - other.tie_break) for one, other in pairs),
    }


def _scores(evaluation: Evaluation) -> Any:
    assert evaluation.scores is not None
    (scores,) = evaluation.scores.values()
    return scores


@contextmanager
def at_most(device: torch.device, gib: float) -> Iterator[None]:
    """Let this process have so much memory beside what it holds now, until the block is left."""
    free_memory()
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = torch.cuda.memory_reserved(device) + gib * 2**30
    torch.cuda.set_per_process_memory_fraction(min(allowed / total, 1.0), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)

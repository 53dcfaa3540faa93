"""Memory that runs out: batches shrink until they fit, with the same scores, or one line says what to lower."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_tasks as tiny
import torch
from asking import observed

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.errors import OutOfMemory
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation
from moe_evo.models.ranks import Ranks
from moe_evo.models.view import MoEModel

PRUNED = Genome.from_kept([[0, 2], [1, 3]], 4, 2)
PROMPTS = [{"prompt": f"{n} one two"} for n in range(8)]

LIMITED = """
import json, resource, sys
from pathlib import Path

sys.path.append(sys.argv[1])
import tiny_tasks as tiny
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.errors import OutOfMemory
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.models.view import MoEModel

def limit(mib):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + mib * 2**20, resource.RLIM_INFINITY))

def scores(evaluator):
    return evaluator.examine([None], "search")[0]["texts"].score.tolist()

torch.set_num_threads(1)
torch.manual_seed(0)
config = MixtralConfig(**{**tiny.SIZES, "vocab_size": 100_000}, num_local_experts=4, num_experts_per_tok=2)
model = MixtralForCausalLM(config).eval()
tokenizer = tiny.tiny_tokenizer()
texts = [{"text": f"{n:02} " + "one two three " * 20} for n in range(16)]
task = tiny.make_task(Path(sys.argv[2]), texts, tokenizer, batch_tokens=4096)
moe = MoEModel(model, tokenizer, merged_cache_gib=0)

def evaluator():
    return Evaluator(moe, [task], EvaluationConfig(batch_tokens=4096))

unlimited, limited, hopeless = evaluator(), evaluator(), evaluator()
(batch,) = task.batches("search")
answer = {"rows": len(batch.examples), "tokens": batch.input_ids.numel(), "unlimited": scores(unlimited)}
limit(300)
answer |= {"limited": scores(limited), "batch_tokens": limited.batch_tokens}
answer |= {"again": scores(limited), "still": limited.batch_tokens}
limit(8)
try:
    scores(hopeless)
except OutOfMemory as error:
    answer |= {"message": str(error)}
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps(answer))
"""


def test_batches_shrink_until_they_fit_into_real_memory_with_the_same_scores(tmp_path: Path) -> None:
    script = [sys.executable, "-c", LIMITED, str(Path(tiny.__file__).parent), str(tmp_path / "texts")]
    # or freed memory stays with the process, in which one row has room
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["rows"] == 16
    np.testing.assert_allclose(answer["limited"], answer["unlimited"], rtol=1e-6)
    assert answer["again"] == answer["limited"]
    assert answer["batch_tokens"] == answer["still"] < answer["tokens"]
    assert answer["message"].startswith("out of memory on cpu with one row in a batch: lower ")
    assert "\n" not in answer["message"]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the allocator keeps what is free")
def test_what_is_free_goes_back_to_the_system_every_few_genomes(evaluator: Evaluator, monkeypatch) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    size = 100_000  # below what the allocator maps by itself
    evaluator.evaluate([None] * 9, "search")  # equal ones are scored once
    blocks = [torch.zeros(size, dtype=torch.uint8) for _ in range(1000)]
    full = resident()
    blocks = blocks[::100] + blocks[-1:]  # those that are left keep the heap from shrinking by itself
    others = [Genome.from_kept([[0, 1 + n % 3], [n // 3, 3]], 4, 2) for n in range(7)]
    evaluator.evaluate(others[:6], "search")
    assert full - resident() < 0.2 * 1000 * size
    evaluator.evaluate(others[6:], "search")
    assert full - resident() > 0.7 * 1000 * size and not any(block.any() for block in blocks)


@pytest.fixture
def evaluator(tmp_path: Path) -> Evaluator:
    moe = MoEModel(tiny.tiny_mixtral(), tiny.tiny_tokenizer(bos=True))
    task = tiny.make_task(tmp_path / "like", PROMPTS, moe.tokenizer, kind="distillation", batch_tokens=512)
    return Evaluator(moe, [task], EvaluationConfig(batch_tokens=512))


def fits(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch, most_tokens: int, after: int = 0) -> list[int]:
    """Let larger batches run out of memory after so many passes; returns the tokens of each pass."""
    language_model, passes = evaluator.model.language_model, []
    original = language_model.forward

    def forward(**arguments):
        passes.append(arguments["input_ids"].numel())
        if passes[-1] > most_tokens and len(passes) > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return original(**arguments)

    monkeypatch.setattr(language_model, "forward", forward)
    return passes


def test_references_are_made_anew_for_the_smaller_batches(evaluator, monkeypatch) -> None:
    (expected,) = evaluator.evaluate([PRUNED], "search")
    evaluator._batches.forget()
    passes = fits(evaluator, monkeypatch, most_tokens=20, after=1)  # the reference still fits, the genome does not
    (outcome,) = evaluator.evaluate([PRUNED], "search")
    whole = passes[0]
    assert passes[1] == whole > 20 and max(passes[2:]) <= 20
    assert isinstance(outcome, Evaluation) and outcome.num_examples == 8
    assert outcome.fitness == pytest.approx(expected.fitness, abs=1e-6)
    assert evaluator.batch_tokens < 512


def test_so_many_genomes_go_together_as_fit(tmp_path, monkeypatch) -> None:
    moe = MoEModel(tiny.tiny_mixtral(), tiny.tiny_tokenizer(bos=True))
    task = tiny.make_task(tmp_path / "like", PROMPTS, moe.tokenizer, kind="distillation", batch_tokens=512)
    evaluator = Evaluator(moe, [task], EvaluationConfig(batch_tokens=512, pack_tokens=512))
    genomes = [Genome.from_kept([[0, first], [1, 3]], 4, 2) for first in (1, 2, 3)]
    expected = evaluator.evaluate(genomes, "search")
    assert evaluator._engine is not None
    evaluator._engine.states.clear()
    layer, copies = moe.language_model.model.layers[1], []
    original, single = layer.forward, len(task.batches("search")[0].input_ids)

    def forward(hidden, *args, **kwargs):
        copies.append(len(hidden) // single)
        if copies[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return original(hidden, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", forward)
    outcomes = evaluator.evaluate(genomes, "search")
    assert copies[0] == 3 and copies[-1] == 1
    assert [one.fitness for one in outcomes] == pytest.approx([one.fitness for one in expected], abs=1e-6)


def test_merged_layers_are_given_up_for_room(evaluator, monkeypatch) -> None:
    merged = tiny.tiny_merge(evaluator.model.shape)
    evaluator.evaluate([merged], "search")
    assert len(evaluator.model.merged_cache) == 2
    evaluator._engine.forget()
    fits(evaluator, monkeypatch, most_tokens=20)
    evaluator.evaluate([PRUNED], "search")
    assert len(evaluator.model.merged_cache) == 0


def test_observing_shrinks_batches_too(evaluator, monkeypatch) -> None:
    expected = observed(evaluator)
    fits(evaluator, monkeypatch, most_tokens=20)
    for found, layer in zip(observed(evaluator).layers, expected.layers, strict=True):
        assert np.array_equal(found.tokens, layer.tokens)
    assert evaluator.batch_tokens < 512


def test_one_row_that_does_not_fit_is_an_error_that_says_what_to_lower(evaluator, monkeypatch) -> None:
    fits(evaluator, monkeypatch, most_tokens=0)
    with pytest.raises(OutOfMemory, match=r"with one row in a batch: lower evaluation\.batch_tokens .* max_length"):
        evaluator.evaluate([PRUNED], "search")


def test_memory_that_runs_out_before_any_pass_ends_too(evaluator) -> None:
    evaluator.evaluate([PRUNED], "search")

    def exhausted() -> None:
        raise MemoryError

    with pytest.raises(OutOfMemory, match="with one row in a batch"):
        evaluator.within_memory(exhausted)


def test_a_rank_among_several_gives_up_at_once_as_the_others_wait(tmp_path, monkeypatch) -> None:
    moe = MoEModel(tiny.tiny_mixtral(), tiny.tiny_tokenizer(bos=True), ranks=Ranks(0, 2))
    task = tiny.make_task(tmp_path / "like", PROMPTS, moe.tokenizer, kind="distillation")
    evaluator = Evaluator(moe, [task], EvaluationConfig(batch_tokens=64, share_layers=False))
    passes = fits(evaluator, monkeypatch, most_tokens=8)
    with pytest.raises(OutOfMemory, match=r"with batches of \d+ tokens: lower evaluation\.batch_tokens \(now 64\)"):
        evaluator.evaluate([PRUNED], "search")
    assert len(passes) == 1


def test_other_errors_of_a_pass_are_raised_as_they_are(evaluator, monkeypatch) -> None:
    def broken(**_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(evaluator.model.language_model, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        evaluator.evaluate([PRUNED], "search")
    assert evaluator.batch_tokens == 512

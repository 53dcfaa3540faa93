"""Models whose rotary embedding depends on the longest row of a batch: each row is what it is alone, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_tasks as tiny
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import ScoringConfig
from moe_evo.config.task import TaskConfig
from moe_evo.errors import ConfigError
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.models.load import load_model
from moe_evo.models.source import ModelSource
from moe_evo.runs.checks import model_problems

SHORT = 24
LONGROPE = {
    "rope_type": "longrope", "original_max_position_embeddings": SHORT, "factor": 4.0,
    "short_factor": [1.0] * 4, "long_factor": [9.0] * 4,
}  # fmt: skip
ROPES: dict[str, tuple[dict[str, Any], int | None]] = {
    "dynamic": ({"rope_type": "dynamic", "factor": 8.0}, SHORT),
    "longrope": (LONGROPE, SHORT),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": SHORT}, None),
    "linear": ({"rope_type": "linear", "factor": 2.0}, None),
    "default": ({"rope_type": "default"}, None),
}
ROWS = [
    {"prompt": "yes", "choices": [" no", " maybe"], "label": 0},
    {
        "prompt": "one two three four five six one two three four five six one two",
        "choices": [" no", " yes"],
        "label": 1,
    },
]


def source(folder: Path, rope: dict[str, Any]) -> ModelSource:
    torch.manual_seed(0)
    positions = SHORT if rope["rope_type"] == "dynamic" else 4 * SHORT
    sizes = {
        **tiny.SIZES,
        "head_dim": 8,
        "max_position_embeddings": positions,
        "rope_parameters": {"rope_theta": 1e4, **rope},
    }
    config = MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    MixtralForCausalLM(config).eval().save_pretrained(folder / "model")
    return ModelSource(ModelConfig(path=str(folder / "model"), device="cpu", self_check=False))


def evaluator(model: ModelSource, folder: Path, max_length: int, batch_tokens: int) -> Evaluator:
    task = tiny.make_task(
        folder / "task", ROWS, tiny.tiny_tokenizer(), batch_tokens=batch_tokens, metric="log_likelihood",
        max_length=max_length,
    )  # fmt: skip
    return Evaluator(load_model(model), [task], EvaluationConfig(threads=1, batch_tokens=batch_tokens))


def scores(found: Any) -> Any:
    (of_tasks,) = found.examine([None], "search")
    return of_tasks["task"].score


@pytest.mark.parametrize("rope", ROPES)
def test_scores_do_not_depend_on_what_is_in_the_batch(tmp_path: Path, rope: str) -> None:
    parameters, limit = ROPES[rope]
    model = source(tmp_path, parameters)
    length = 64 if limit is None else limit
    together, alone = (scores(evaluator(model, tmp_path, length, tokens)) for tokens in (4096, 1))
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rope", [name for name, (_, limit) in ROPES.items() if limit])
def test_rows_beyond_the_length_at_which_it_would_matter_are_refused_before_weights_are_read(
    tmp_path: Path, rope: str
) -> None:
    parameters, limit = ROPES[rope]
    model = source(tmp_path, parameters)
    assert limit is not None
    task = TaskConfig(data=tiny.write_splits(tmp_path / "data", ROWS), max_length=limit + 1)
    (problem,) = model_problems(ScoringConfig(model=model.config, tasks=[task]), model)
    assert f"max_length: got {limit + 1}, expected at most {limit}" in str(problem) and "\n" not in str(problem)
    with pytest.raises(ConfigError, match=f"got {limit + 1}, expected at most {limit}"):
        evaluator(model, tmp_path, limit + 1, 4096)


@pytest.mark.parametrize("rope", [name for name, (_, limit) in ROPES.items() if limit])
def test_beyond_that_length_stock_transformers_depends_on_the_batch(tmp_path: Path, rope: str) -> None:
    """Why they are refused: a short row beside a long one has other logits than alone."""
    model = load_model(source(tmp_path, ROPES[rope][0])).language_model
    short, rows = torch.arange(3, 11)[None], torch.arange(3, 63).repeat(2, 1)
    rows[0, :8] = short
    with torch.inference_mode():
        beside = model(input_ids=rows, use_cache=False).logits[0, :8]
        alone = model(input_ids=short, use_cache=False).logits[0]
    assert (beside - alone).abs().max() > 1e-3

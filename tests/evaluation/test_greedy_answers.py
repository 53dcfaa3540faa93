"""Answers are greedy whatever the checkpoint's own generation config asks for; the oracle is one full pass a token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_tasks as tiny

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.errors import ModelError
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.models.load import load_model
from moe_evo.models.source import ModelSource
from moe_evo.models.view import MoEModel

PROMPTS = ["one two three", "yes", "the capital of france is paris and of japan", "good bad"]
NUM_NEW = 6

SETTINGS: list[dict[str, Any]] = [
    {"min_new_tokens": 5},
    {"min_length": 40},
    {"max_length": 3},
    {"guidance_scale": 2.5},
    {"watermarking_config": {"greenlist_ratio": 0.1, "bias": 9.0}},
    {"no_repeat_ngram_size": 1},
    {"repetition_penalty": 3.0},
    {"encoder_repetition_penalty": 3.0},
    {"max_time": 1e-9},
    {"stop_strings": ["e", " "]},
    {"return_dict_in_generate": True},
    {"output_scores": True, "output_logits": True, "return_dict_in_generate": True},
    {"do_sample": True, "temperature": 9.0, "top_k": 3, "top_p": 0.5, "num_return_sequences": 2},
    {"num_beams": 3, "num_return_sequences": 2, "length_penalty": -4.0, "early_stopping": True},
    {"prompt_lookup_num_tokens": 3},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"bad_words_ids": [[5], [6], [7]]},
    {"suppress_tokens": list(range(3, 200)), "begin_suppress_tokens": list(range(200, 349))},
    {"forced_eos_token_id": 2, "forced_bos_token_id": 7},
    {"exponential_decay_length_penalty": [1, 9.0]},
    {"sequence_bias": [[[5], 99.0]]},
    {"renormalize_logits": True, "remove_invalid_values": True},
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"cache_implementation": "quantized"},
    {"token_healing": True},
    {"return_dict": False},
    {"output_attentions": True, "output_hidden_states": True},
    {"of_nobody": 3},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with a tokenizer."""
    made = tmp_path_factory.mktemp("mixtral")
    tiny.tiny_mixtral().save_pretrained(made)
    tiny.tiny_tokenizer(bos=True).save_pretrained(made)
    return made


def loaded(folder: Path) -> MoEModel:
    return load_model(ModelSource(ModelConfig(path=str(folder), device="cpu", self_check=False)))


def with_json(folder: Path, target: Path, name: str, changes: dict[str, Any]) -> Path:
    """A copy of the checkpoint with other values in one of its JSON files."""
    shutil.copytree(folder, target)
    content = json.loads((target / name).read_text())
    (target / name).write_text(json.dumps({**content, **changes}))
    return target


def plain_greedy(model: Any, tokenizer: Any, prompt: str, ends: list[int]) -> str:
    tokens = tokenizer(prompt)["input_ids"]
    length = len(tokens)
    for _ in range(NUM_NEW):
        tokens = [*tokens, int(tiny.alone(model, tokens)[-1].argmax())]
        if tokens[-1] in ends:
            break
    return str(tokenizer.decode(tokens[length:], skip_special_tokens=True))


def answers(model: MoEModel, tmp_path: Path, expected: list[str], *, share_layers: bool) -> list[float]:
    """Whether each generated answer is the expected one, as an evaluator scores it."""
    rows = [
        {"prompt": prompt, "answers": [text if text.strip() else "?"]}
        for prompt, text in zip(PROMPTS, expected, strict=True)
    ]
    task = tiny.make_task(tmp_path / "task", rows, model.tokenizer, max_new_tokens=NUM_NEW, stop="")
    evaluator = Evaluator(model, [task], EvaluationConfig(share_layers=share_layers, threads=1))
    (found,) = evaluator.examine([None], "search")
    assert isinstance(found, dict), found
    scores: list[float] = found["task"].score.tolist()
    return scores


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[str]:
    model = loaded(folder)
    texts = [plain_greedy(model.language_model, model.tokenizer, prompt, [2]) for prompt in PROMPTS]
    assert all(text.strip() for text in texts), "an empty answer could not be told from a wrong one"
    return texts


@pytest.mark.parametrize("share_layers", [True, False], ids=["engine", "alone"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda one: ",".join(one))
def test_answers_are_greedy_whatever_the_generation_config_asks_for(
    folder: Path, expected: list[str], tmp_path: Path, settings: dict[str, Any], share_layers: bool
) -> None:
    model = loaded(with_json(folder, tmp_path / "own", "generation_config.json", settings))
    asked_for = model.language_model.generation_config.to_dict()
    assert answers(model, tmp_path, expected, share_layers=share_layers) == [1.0] * len(PROMPTS)
    assert model.language_model.generation_config.to_dict() == asked_for, "an export keeps what the model came with"


@pytest.mark.parametrize(
    "settings", [{"return_dict": False}, {"use_cache": False}, {"output_hidden_states": True}, {"min_length": 40}],
    ids=lambda one: ",".join(one),
)  # fmt: skip
def test_answers_are_greedy_whatever_the_config_asks_for(
    folder: Path, expected: list[str], tmp_path: Path, settings: dict[str, Any]
) -> None:
    own = with_json(folder, tmp_path / "own", "config.json", settings)
    (own / "generation_config.json").unlink()
    assert answers(loaded(own), tmp_path, expected, share_layers=True) == [1.0] * len(PROMPTS)


def test_the_models_own_end_tokens_end_an_answer(folder: Path, tmp_path: Path) -> None:
    plain = loaded(folder)
    tokenizer, prompt = plain.tokenizer, tokenizer_input(plain, PROMPTS[0])
    second = int(tiny.alone(plain.language_model, [*prompt, first(plain, prompt)])[-1].argmax())
    ended = loaded(with_json(folder, tmp_path / "own", "generation_config.json", {"eos_token_id": [2, second]}))
    expected = [plain_greedy(plain.language_model, tokenizer, one, [2, second]) for one in PROMPTS]
    assert expected[0] == tokenizer.decode([first(plain, prompt), second])
    assert answers(ended, tmp_path, expected, share_layers=True) == [1.0] * len(PROMPTS)


def tokenizer_input(model: MoEModel, prompt: str) -> list[int]:
    tokens: list[int] = model.tokenizer(prompt)["input_ids"]
    return tokens


def first(model: MoEModel, tokens: list[int]) -> int:
    return int(tiny.alone(model.language_model, tokens)[-1].argmax())


def test_the_hash_covers_the_end_tokens_and_nothing_else_of_the_generation_config(folder: Path, tmp_path: Path) -> None:
    def hash_with(name: str, settings: dict[str, Any]) -> str:
        return ModelSource(
            ModelConfig(path=str(with_json(folder, tmp_path / name, "generation_config.json", settings)))
        ).hash

    plain = ModelSource(ModelConfig(path=str(folder))).hash
    assert hash_with("warm", {"temperature": 0.3, "do_sample": True}) == plain
    assert hash_with("same", {"eos_token_id": 2}) == plain
    assert len({plain, hash_with("other", {"eos_token_id": [2, 5]}), hash_with("none", {"eos_token_id": None})}) == 3


def test_a_generation_config_that_is_no_object_is_refused(folder: Path, tmp_path: Path) -> None:
    own = with_json(folder, tmp_path / "own", "generation_config.json", {})
    (own / "generation_config.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"generation_config\.json: holds list, expected an object"):
        _ = ModelSource(ModelConfig(path=str(own))).hash

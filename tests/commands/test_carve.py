"""`moe-evo carve`, from the command line to a checkpoint that stock transformers loads."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refusal, taken_folder
from tiny_models import largest_difference, logits, tiny_model, tokens
from tiny_tasks import tiny_tokenizer, write_rows
from transformers import AutoModelForCausalLM

import moe_evo
from moe_evo.api import functions
from moe_evo.cli.main import main
from moe_evo.commands import carve as command

TASK = "[{data: syll, num_search: 8, num_validation: 4, num_test: 8}]"
OPTIONS = ("--tasks", TASK, "--model.self_check", "false", "--evaluation.threads", "1")
INNER = 64
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 6}
SOURCES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "llama, wide heads": {"head_dim": 16},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen2, sliding": {**WINDOW, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "qwen3, sliding": {**WINDOW, "head_dim": 8, "attention_bias": True, "max_window_layers": 0},
}
FORMATS = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}


def dense_folder(folder: Path, source: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A tiny random dense model with a tokenizer."""
    settings = {"vocab_size": 350, "intermediate_size": INNER, **SOURCES[source], **changes}
    model = tiny_model(source.split(",")[0], **settings)
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer(bos=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_folder(tmp_path_factory.mktemp("llama") / "dense")


def carve(dense: Path, target: Path, *words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["carve", str(dense), *OPTIONS, "--to", str(target), *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def difference(dense: Path, carved: Path) -> float:
    ids = tokens(length=24)
    return largest_difference(logits(stock(dense), ids), logits(stock(carved), ids))


@pytest.mark.parametrize("source", SOURCES)
def test_with_all_experts_active_stock_logits_are_those_of_the_dense_model(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = dense_folder(tmp_path / "dense", source)
    report = carve(dense, tmp_path / "carved", "--num_experts", "4", "--top_k", "4", capsys=capsys)
    assert difference(dense, tmp_path / "carved") <= 1e-5 and report["all_active_difference"] <= 1e-5
    assert report["family"] == FORMATS[source.split(",")[0]] and report["loader"] == "transformers"
    config = stock(tmp_path / "carved").config
    assert config.num_experts_per_tok == 4 and report["expert_size"] == INNER // 4
    assert report["parameters_before"] == sum(one.numel() for one in stock(dense).parameters())
    assert report["parameters_after"] == sum(one.numel() for one in stock(tmp_path / "carved").parameters())
    assert report["scores"]["dense"]["fitness"] == report["scores"]["carved"]["fitness"]


@pytest.mark.parametrize("source", ["llama", "mistral", "qwen2, sliding"])
def test_a_shared_expert_runs_with_the_weight_one(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = dense_folder(tmp_path / "dense", source)
    words = ("--num_experts", "4", "--top_k", "4", "--shared_size", "32")
    report = carve(dense, tmp_path / "carved", *words, capsys=capsys)
    assert difference(dense, tmp_path / "carved") <= 1e-5
    assert report["family"] == "qwen2_moe" and report["shared_size"] == 32 and report["expert_size"] == 8


@pytest.mark.parametrize("top_k", ["1", "3"])
@pytest.mark.parametrize("source", ["llama, tied", "mistral", "qwen2", "qwen3"])
def test_copies_compute_the_dense_model_whatever_number_is_active(
    source: str, top_k: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = dense_folder(tmp_path / "dense", source)
    words = ("--method", "upcycle", "--num_experts", "3", "--top_k", top_k)
    report = carve(dense, tmp_path / "copied", *words, capsys=capsys)
    assert difference(dense, tmp_path / "copied") <= 1e-5
    assert report["layers"] == [] and report["expert_size"] == INNER
    copied = stock(tmp_path / "copied")
    gates = copied.model.layers[0].mlp.experts.gate_up_proj
    assert gates.shape[0] == 3 and torch.equal(gates[0], gates[2])


def test_fewer_active_experts_are_worse_and_each_counts_as_in_the_dense_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = dense_folder(tmp_path / "dense")
    report = carve(dense, tmp_path / "carved", "--router", "centroid", capsys=capsys)
    assert report["num_experts"] == 8 and report["top_k"] == 4
    assert all(0 < one["best_error"] <= one["relative_error"] < 1 for one in report["layers"])
    assert difference(dense, tmp_path / "carved") > 1e-2
    model, carved = stock(dense), stock(tmp_path / "carved")
    experts, whole = carved.model.layers[0].mlp.experts, model.model.layers[0].mlp
    columns = {tuple(column.tolist()) for column in whole.down_proj.weight.T}
    assert {tuple((column / 4).tolist()) for down in experts.down_proj for column in down.T} == columns
    unused = report["parameters_after"] - report["active_parameters"]
    assert unused == 3 * 4 * 3 * 32 * 8  # layers, experts, matrices, hidden size, neurons


def test_bfloat16_is_carved_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = dense_folder(tmp_path / "dense", dtype=torch.bfloat16)
    report = carve(dense, tmp_path / "carved", capsys=capsys)
    assert stock(tmp_path / "carved").dtype == torch.bfloat16
    assert report["all_active_difference"] < 0.1 and report["layers"][0]["relative_error"] < 1


def test_the_same_seed_makes_the_same_experts_and_another_may_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = dense_folder(tmp_path / "dense")
    states = []
    for number, seed in enumerate(("0", "0", "1")):
        carve(dense, tmp_path / str(number), "--seed", seed, "--profile_tokens", "40", capsys=capsys)
        states.append(stock(tmp_path / str(number)).state_dict())
    same, other = ([torch.equal(one, states[0][name]) for name, one in state.items()] for state in states[1:])
    assert all(same) and not all(other)


def test_neurons_are_watched_on_the_prompts_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = dense_folder(tmp_path / "dense")
    prompts = write_rows(
        tmp_path / "more.jsonl", [{"text": "the cat sat on a mat"}, {"prompt": "word: cat\nsyllables:"}]
    )
    first = carve(dense, tmp_path / "first", capsys=capsys)
    second = carve(dense, tmp_path / "second", "--prompts", str(prompts), capsys=capsys)
    assert first["layers"] != second["layers"]
    told = (tmp_path / "second" / "moe_evo.json").read_text()
    assert "more.jsonl" in told


def test_the_checkpoint_goes_on_to_recovery_from_the_dense_model_and_to_pruning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = dense_folder(tmp_path / "dense")
    carve(dense, tmp_path / "carved", "--top_k", "2", capsys=capsys)
    full = ("--model.path", str(dense))
    learn = ("--recover.methods", "logits", "--recover.learning_rate", "0.0005", "--recover.steps", "20")
    words = ["recover", str(tmp_path / "carved"), "--to", str(tmp_path / "recovered"), *OPTIONS, *full, *learn]
    assert main([*words, "--recover.batch_size", "4", "--recover.answer_tokens", "2", "--json"]) == 0
    recovered = json.loads(capsys.readouterr().out)
    for stage in recovered["stages"]:
        losses = [check["validation"] for check in stage["learned"]["checks"]]
        assert min(losses[1:]) < losses[0]
    assert recovered["parameters_before"] == sum(one.numel() for one in stock(dense).parameters())
    assert main(["evaluate", *OPTIONS, *full, "--split", "test", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["fitness"] == recovered["scores"]["full"]["fitness"] and alone["num_kept"] == [1, 1, 1]
    words = ["prune", *OPTIONS, "--model.path", str(tmp_path / "recovered"), "--method", "reap", "--num_kept", "4"]
    assert main([*words, "--to", str(tmp_path / "pruned"), "--json"]) == 0
    assert stock(tmp_path / "pruned").config.num_local_experts == 4


def test_outputs_of_experts_are_not_compared_where_a_shared_one_does_part_of_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = dense_folder(tmp_path / "dense")
    carve(dense, tmp_path / "carved", "--num_experts", "2", "--top_k", "2", "--shared_size", "32", capsys=capsys)
    words = ["recover", str(tmp_path / "carved"), "--to", str(tmp_path / "recovered"), *OPTIONS]
    assert main([*words, "--model.path", str(dense)]) == 2
    assert "has a shared expert beside them" in capsys.readouterr().err
    assert not (tmp_path / "recovered").exists()


def test_a_carved_model_is_repaired_in_closed_form_where_neither_has_a_shared_expert(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = dense_folder(tmp_path / "dense", "qwen2")
    carve(dense, tmp_path / "carved", "--top_k", "2", "--shared_size", "0", capsys=capsys)
    words = ["recover", str(tmp_path / "carved"), "--to", str(tmp_path / "recovered"), *OPTIONS, "--json"]
    learn = ("--recover.methods", "closed_form", "--recover.answer_tokens", "0")
    assert main([*words, "--model.path", str(dense), *learn]) == 0
    checks = json.loads(capsys.readouterr().out)["stages"][0]["learned"]["checks"]
    assert min(check["validation"] for check in checks[1:]) < checks[0]["validation"]


def test_card_and_record_tell_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = dense_folder(tmp_path / "dense")
    assert (
        main(
            [
                "carve",
                str(dense),
                *OPTIONS,
                "--to",
                str(tmp_path / "carved"),
                "--shared_size",
                "32",
                "--num_experts",
                "4",
            ]
        )
        == 0
    )
    printed = capsys.readouterr()
    for told in (
        "dense model   ", "carved model  ", "with the best experts",
        "experts     4 of 8 neurons in each layer, 2 active, and a shared one of 32 (qwen2_moe)",
    ):  # fmt: skip
        assert told in printed.out
    assert "watching neurons" in printed.err and "carving" in printed.err
    card = (tmp_path / "carved" / "README.md").read_text()
    assert "# dense with carved experts" in card.splitlines()
    assert "the 64 neurons of each FFN were shared out among experts, 32 of them in a shared one" in card
    record = json.loads((tmp_path / "carved" / "moe_evo.json").read_text())
    assert record["base_model"] == "dense" and record["provenance"]["carving"]["shared_size"] == 32


def test_the_example_in_the_docstring_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense_folder(tmp_path / "dense", intermediate_size=128)
    monkeypatch.chdir(tmp_path)
    (found,) = doctest.DocTestFinder(recurse=False).find(functions.carve, "carve")
    assert found.examples and doctest.DocTestRunner().run(found).failed == 0
    assert "carve" in moe_evo.__all__


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_experts", "1"], "--num_experts: got 1, expected 2 or more"),
        (["--num_experts", "4", "--top_k", "5"], "--top_k: got 5, expected 1 to 4, as many as there are"),
        (["--top_k", "0"], "--top_k: got 0"),
        (["--num_experts", "5"], "expected experts of equal size, a multiple of 8 neurons; use --shared_size 24, or"),
        (["--num_experts", "16"], "a multiple of 8 neurons; use another number"),
        (["--num_experts", "4", "--shared_size", "9"], "use --shared_size 0 or 32, or another number"),
        (["--shared_size", "60"], "--shared_size: got 60, expected 0 to 56"),
        (["--router", "magic"], "router"),
        (["--method", "cut"], "method"),
        (["--seed", "-1"], "--seed: got -1"),
        (["--profile_tokens", "0"], "--profile_tokens: got 0, expected 1 or more"),
        (["--method", "upcycle", "--router", "centroid"], "--router: got 'centroid', expected nothing: upcycle"),
        (["--method", "upcycle", "--shared_size", "8"], "--shared_size: got 8, expected nothing"),
        (["--prompts", "NOWHERE"], "--prompts: got 'NOWHERE', expected a file"),
        (["--model.path", "embedded"], "--model.path: got it beside MODEL"),
        (["--cluster.address", "local"], "carve needs no cluster"),
        (["--tasks", "[{data: syll, kind: distillation}]"], "compares with the model itself"),
        (["--to", "TAKEN"], "TAKEN: is not empty"),
        (["MODEL", "embedded"], "is a Mixture-of-Experts model (mixtral) already; give a dense one"),
        (["MODEL", "TAKEN"], "has no config.json"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_before_a_model_is_loaded(
    words: list[str], message: str, llama: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    taken = taken_folder(tmp_path)
    words = [word.replace("TAKEN", str(taken)) for word in words]
    usual = {"MODEL": str(llama), "--to": str(tmp_path / "carved")} | dict(zip(words[::2], words[1::2], strict=True))
    model = usual.pop("MODEL")
    capsys.readouterr()
    given = ["carve", model, *OPTIONS, *(word for pair in usual.items() for word in pair)]
    assert message.replace("TAKEN", str(taken)) in refusal(given, tmp_path / "carved", command, capsys, monkeypatch)
    assert (taken / "file").read_text() == "something else"


@pytest.mark.parametrize(
    ("source", "changes", "words", "message"),
    [
        ("llama", {"attention_bias": True}, [], "attention_bias: got True, expected false"),
        ("llama", {"mlp_bias": True}, [], "mlp_bias: got True, expected false"),
        ("llama, wide heads", {}, ["--shared_size", "32", "--num_experts", "4"], "head_dim: got 16, expected 8"),
        (
            "qwen3",
            {},
            ["--shared_size", "32", "--num_experts", "4"],
            "--shared_size: got 32, expected 0: qwen3_moe has no shared expert",
        ),
        ("qwen3", {**WINDOW, "max_window_layers": 1}, [], "layer_types: got full_attention and sliding_attention"),
    ],
)
def test_what_no_stock_format_can_say_is_refused(
    source: str, changes: dict[str, Any], words: list[str], message: str,
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    dense = dense_folder(tmp_path / "dense", source, **changes)
    capsys.readouterr()
    given = ["carve", str(dense), *OPTIONS, "--to", str(tmp_path / "carved"), *words]
    assert message in refusal(given, tmp_path / "carved", command, capsys, monkeypatch)


def test_other_models_and_quantised_ones_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = dense_folder(tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    capsys.readouterr()
    for change, message in (
        ({"model_type": "gpt2"}, "got a model of type 'gpt2', expected one of llama, mistral, qwen2, qwen3"),
        ({"quantization_config": {"quant_method": "fp8"}}, "the checkpoint is quantised"),
    ):
        (dense / "config.json").write_text(json.dumps({**config, **change}))
        given = ["carve", str(dense), *OPTIONS, "--to", str(tmp_path / "carved")]
        assert message in refusal(given, tmp_path / "carved", command, capsys, monkeypatch)


def test_a_dense_model_elsewhere_is_refused_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = dense_folder(tmp_path / "dense")
    words = ["prune", *OPTIONS, "--model.path", str(dense), "--method", "reap", "--num_kept", "1", "--to"]
    assert main([*words, str(tmp_path / "pruned")]) == 2
    assert "moe-evo carve makes one of a dense model" in capsys.readouterr().err


def test_a_carved_model_that_differs_from_the_dense_one_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_evo.models.carve import build

    dense = dense_folder(tmp_path / "dense")
    monkeypatch.setattr(build, "_SPREAD_OF_ALL", 1.0)  # as if weights were not equal
    assert main(["carve", str(dense), *OPTIONS, "--to", str(tmp_path / "carved")]) == 2
    assert "with all experts active the carved model differs from the dense one" in capsys.readouterr().err
    assert not (tmp_path / "carved").exists()


def test_help_tells_what_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["carve", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "moe-evo carve MODEL" in told and "is the dense model when all experts are active" in told

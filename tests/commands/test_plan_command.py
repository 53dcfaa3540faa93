"""`moe-evo plan` as a user meets it, and what is refused for the same reasons before a cluster is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_evo.cli.main import main

FAST = [
    "--tasks", '[{"data": "syll", "num_search": 12, "num_validation": 8, "num_test": 8}]',
    "--search.evaluations", "6", "--selection.finalists", "2", "--evaluation.threads", "1",
]  # fmt: skip


def test_plan_tells_of_a_search_and_ends_with_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *FAST, "--memory_gib", "4"]) == 0
    text = capsys.readouterr().out
    assert "device memory 4.0 GiB" in text
    command = text.splitlines()[-1]
    assert command.startswith("next        moe-evo search --tasks")
    assert "memory_gib" not in command


def test_plan_can_measure_an_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *FAST, "--calibrate", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["problems"] == []
    assert told["estimate"]["evaluation_s"] > 0


def test_plan_lists_everything_that_is_wrong_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--tasks", "[nowhere.jsonl]", "--search.num_kept", "9"]) == 2
    shown = capsys.readouterr()
    assert "nowhere.jsonl" in shown.out
    assert "search.num_kept: got 9" in shown.out
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("size", ["0", "-4"])
def test_plan_refuses_a_device_without_memory(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *FAST, "--memory_gib", size]) == 2
    assert f"memory_gib: got {size}, expected more than 0" in capsys.readouterr().err


def test_ranks_that_cannot_share_a_model_are_refused_before_a_cluster_is_asked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gang = ["--cluster.address", "auto", "--model.sharding", "tensor_parallel", "--cluster.gang_size", "3"]
    for command in (["search", "--folder", str(tmp_path / "run")], ["evaluate", "--genome", "full"]):
        tasks = FAST[:2]
        assert main([*command[:1], *tasks, *command[1:], *gang]) == 2
        assert "which 3 does not divide" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_plan_of_a_recovery_is_what_it_then_stores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = "[{data: syll, num_search: 12, num_validation: 8, num_test: 8}]"
    words = [
        "--tasks",
        task,
        "--search.num_kept",
        "3",
        "--folder",
        str(tmp_path / "run"),
    ]
    learning = ["--recover", "--recover.block_tokens", "50"]
    assert main(["plan", *words, *learning, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["recovery"]
    assert told["prompts"] == 12 and told["block_bytes"] == 50 * 128 * 4 * 4
    # 4 layers of 3 experts of 128 x 208 with a router of 3 rows and two norms each, and a last norm
    assert told["trained_numbers"] == 4 * (3 * 3 * 128 * 208 + 3 * 128 + 2 * 128) + 128
    adapters = ["--recover.train", "adapters", "--recover.rank", "4"]
    assert main(["plan", *words, *learning, "--json", *adapters]) == 0
    few = json.loads(capsys.readouterr().out)["recovery"]
    assert few["trained_numbers"] == 4 * 3 * 4 * (128 + 2 * 208 + 208 + 128)
    assert few["training_bytes"] < 0.6 * told["training_bytes"]
    assert main(["plan", *words, *learning]) == 0
    out = capsys.readouterr().out
    assert f"training {told['trained_numbers']:,} numbers takes " in out
    assert "recovery    12 prompts, up to " in out and out.strip().endswith(" ".join(learning))
    assert main(["plan", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recovery"] is None
    kept: list[int] = []

    def look(*_: object, **__: object) -> None:
        kept.extend(file.stat().st_size for file in (tmp_path / "run" / "recovered.recovery" / "lessons").glob("*-0*"))
        raise KeyboardInterrupt

    search = ["--search.evaluations", "2", "--selection.finalists", "1", "--selection.baselines", "[]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_evo.commands.recover._train", look)
        assert main(["search", *words, *search, *learning]) == 130
    stored = told["lesson_bytes"] + told["block_bytes"]
    assert 0.3 * stored < sum(kept) < stored + 20_000  # answers end before their longest


def test_what_keeps_a_winner_from_being_recovered_is_a_problem_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--tasks", "syll", "--search.num_kept", "[2, 3, 3, 3]", "--recover"]) == 2
    assert "--recover: got True, expected one search.num_kept for all layers" in capsys.readouterr().err

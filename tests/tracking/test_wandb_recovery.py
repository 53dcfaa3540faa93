"""A recovery in W&B while it runs: real offline runs, read back with wandb's own reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from test_wandb_log import documented
from tracked_runs import Record

from moe_evo.cli.main import main
from moe_evo.recovery.training import Training

TASK = "[{data: syll, num_search: 24, num_validation: 12, num_test: 12}]"
OPTIONS = ("--model.self_check", "false", "--tasks", TASK, "--evaluation.threads", "1")
OFFLINE = ("--tracking.wandb", "offline", "--tracking.group", "healed", "--tracking.tags", "[one]")
SHORT = ("--recover.steps", "6", "--recover.batch_size", "8", "--recover.checks", "3", "--recover.block_tokens", "200")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("pruned") / "checkpoint"
    assert main(["prune", *OPTIONS, "--method", "aimer", "--num_kept", "2", "--to", str(target)]) == 0
    return target


def curve(record: Record, key: str) -> list[tuple[int, int, float]]:
    """Steps, stages and values of a key."""
    found = [item for item in record.history if f"recovery/{key}" in item]
    return [(item["recovery/step"], item["recovery/stage"], item[f"recovery/{key}"]) for item in found]


def test_the_curves_of_a_recovery_are_there_while_it_runs_and_whole_after_a_kill(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "recovered"
    words = ["recover", str(pruned), *OPTIONS, *OFFLINE, *SHORT, "--to", str(target)]
    step: Callable[[Training, int], tuple[float, int]] = Training._step

    def interrupted(training: Training, number: int) -> tuple[float, int]:
        if number == 5:
            raise KeyboardInterrupt
        return step(training, number)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", interrupted)
        assert main(words) == 130
    half = Record(tmp_path / "recovered.tracking")
    assert [point[:2] for point in curve(half, "validation_loss")] == [
        *((layer, 1) for layer in range(5)),  # of the embedded model's four layers
        (4, 2), (6, 2), (8, 2),
    ]  # fmt: skip
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    record = Record(tmp_path / "recovered.tracking")
    expected = [
        (before + check["step"], number, check)
        for number, before, stage in zip((1, 2), (0, 4), told["stages"], strict=True)
        for check in stage["learned"]["checks"]
    ]
    for loss in ("validation", "training"):
        assert curve(record, f"{loss}_loss") == [
            (at, number, check[loss]) for at, number, check in expected if check[loss] is not None
        ]
    for name, score in told["scores"].items():
        assert curve(record, f"test/{name}") == [(10, 2, score["fitness"])]
        assert record.summary[f"recovery/test/{name}"] == score["fitness"]
    run = record.run
    assert (run["run_id"], run["job_type"], run["run_group"], run["tags"]) == (
        half.run["run_id"], "recovery", "healed", ["one"],
    )  # fmt: skip
    assert run["display_name"] == "syll-recover-closed_form+logits-seed0"
    assert "prompts" not in run["config"]["update"] and run["config"]["update"]["steps"] == 6
    assert str(tmp_path) not in json.dumps(run["config"])
    assert {key for key in record.keys if key.startswith("recovery/")} == {
        key for key in documented() if key.startswith("recovery/")
    }
    metrics = [one["metric"] for one in record.records if one["type"] == "metric"]
    assert any(one.get("glob_name") == "*" and one["step_metric"] == "recovery/step" for one in metrics)


def test_without_tracking_nothing_is_kept_beside_the_checkpoint(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    target = tmp_path / "recovered"
    words = ["--recover.methods", "closed_form", "--recover.block_tokens", "200", "--tracking.wandb", "disabled"]
    assert main(["recover", str(pruned), *OPTIONS, *words, "--to", str(target)]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["recovered"]

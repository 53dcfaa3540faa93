"""`moe-evo recover --recover.engine deepspeed`: on the workers of a real Ray of its own, killed and continued."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from recoveries import OPTIONS, weights
from rich.console import Console
from transformers import AutoModelForCausalLM

from moe_evo.cli.main import main
from moe_evo.commands.plan import plan
from moe_evo.config.cluster import ClusterConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.recover import RecoverConfig
from moe_evo.config.run import RunConfig
from moe_evo.config.search import SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.models import load, zero3
from moe_evo.report.plan import print_plan
from moe_evo.report.planned import RecoveryPlan

SHORT = ("--recover.steps", "60", "--recover.batch_size", "8", "--recover.checks", "3")
WORKERS = ("--recover.engine", "deepspeed", "--model.sharding", "zero3", "--cluster.address", "local",
           "--cluster.gang_size", "2", "--cluster.resources", "{CPU: 1}")  # fmt: skip
_START_S = 500.0


def recover(what: Path, target: Path, *words: str, capsys: pytest.CaptureFixture[str]) -> tuple[dict, str]:
    capsys.readouterr()
    assert main(["recover", str(what), *OPTIONS, *SHORT, "--to", str(target), *words, "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def checks(told: dict) -> list[float]:
    return [check["validation"] for stage in told["stages"] for check in stage["learned"]["checks"]]


@pytest.mark.timeout(1500)
def test_killed_as_a_whole_it_goes_on_and_ends_with_the_checkpoint_of_one_device(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, _ = recover(pruned, tmp_path / "torch", capsys=capsys)
    target = tmp_path / "killed"
    words = ["recover", str(pruned), *OPTIONS, *SHORT, *WORKERS, "--to", str(target)]
    state = tmp_path / "killed.recovery" / "state-1" / "state.json"
    with subprocess.Popen([sys.executable, "-m", "moe_evo", *words], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + _START_S
        while not (state.is_file() and json.loads(state.read_text("utf-8"))["learned"]["steps"]):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [one for one in children if "RayTrainWorker" in " ".join(one.cmdline())]
        assert len(workers) == 2
        os.kill(process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(workers, timeout=60)
        for one in children:  # Ray's own agents take their time
            with suppress(psutil.NoSuchProcess):
                one.kill()
        assert not alive and process.stderr is not None
        assert "Warning" not in process.stderr.read()
    assert not target.exists()
    steps = json.loads(state.read_text("utf-8"))["learned"]["steps"]
    assert steps in (20, 40)
    told, progress = recover(pruned, target, *WORKERS, "--recover.zero_stage", "2", capsys=capsys)
    assert f"recovering (logits): {60 - steps} steps" in progress or "recovering (logits): 60 steps" in progress
    assert "Warning" not in progress
    assert checks(told) == pytest.approx(checks(expected), abs=1e-5)
    for key in ("prompts", "positions", "gained", "missing"):
        assert told[key] == expected[key], key
    assert [stage["learned"]["tokens"] for stage in told["stages"]] == [
        stage["learned"]["tokens"] for stage in expected["stages"]
    ]
    other = weights(tmp_path / "torch")
    for name, one in weights(target).items():
        torch.testing.assert_close(one, other[name], rtol=0, atol=1e-4, msg=name)
    assert AutoModelForCausalLM.from_pretrained(target).config.num_local_experts == 2
    assert not (tmp_path / "killed.recovery").exists()


@pytest.mark.timeout(900)
def test_the_winner_of_a_run_learns_from_an_offloaded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    words = ["--search.num_kept", "3", "--search.evaluations", "2", "--selection.finalists", "1"]
    assert main(["search", *OPTIONS, *words, "--selection.baselines", "[]", "--folder", str(folder)]) == 0
    offload = ("--model.offload", "cpu", "--recover.methods", "router", "--recover.steps", "6")
    told, progress = recover(folder, tmp_path / "to", *WORKERS, *offload, capsys=capsys)
    rows = {row["key"]: row for row in json.loads((folder / "result.json").read_text("utf-8"))["rows"]}
    for name, key in (("pruned", "best"), ("full", "full")):
        assert told["scores"][name]["fitness"] == rows[key]["scores"]["test"]["fitness"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "to").config.num_local_experts == 3
    assert "Warning" not in progress


def planned(tmp_path: Path, recover: RecoverConfig, **model: Any) -> tuple[RecoveryPlan, str]:
    """What `moe-evo plan --recover` tells, and how it prints it; the cluster is not asked."""
    config = RunConfig(
        tasks=[TaskConfig(data="syll", num_search=12, num_validation=8, num_test=8)],
        model=ModelConfig(device="cpu", **model),
        cluster=ClusterConfig(address="local", gang_size=2) if model else ClusterConfig(),
        search=SearchConfig(num_kept=4),
        folder=str(tmp_path / "run"),
    )
    found = plan(config, recover=recover)
    assert not found.problems and found.recovery is not None
    printed = io.StringIO()
    print_plan(found, "moe-evo search", Console(file=printed, width=400))
    return found.recovery, printed.getvalue()


def test_the_plan_tells_what_a_worker_takes(tmp_path: Path) -> None:
    alone, printed = planned(tmp_path, RecoverConfig())
    assert alone.workers == 1 and "workers" not in printed.split("recovery ")[1]
    found = {}
    for stage in (2, 3):
        for offload in ("none", "cpu", "nvme"):
            if (stage, offload) != (2, "nvme"):
                place = {"offload_folder": str(tmp_path)} if offload == "nvme" else {}
                recover = RecoverConfig(engine="deepspeed", zero_stage=stage)
                found[stage, offload], printed = planned(tmp_path, recover, sharding="zero3", offload=offload, **place)
                assert found[stage, offload].workers == 2 and "for each of 2 workers, beside activations" in printed
                assert ("of its host's memory" in printed) == (offload != "none")
                assert ("of disk" in printed.split("numbers takes")[1]) == (offload == "nvme")
    assert found[3, "none"].training_bytes < found[2, "none"].training_bytes
    assert found[3, "cpu"].training_bytes < found[3, "none"].training_bytes
    assert found[2, "cpu"].host_bytes > 0 == found[2, "cpu"].disk_bytes < found[3, "nvme"].disk_bytes


def test_the_plan_tells_what_workers_cannot_do(tmp_path: Path) -> None:
    config = RunConfig(tasks=[TaskConfig(data="syll")], search=SearchConfig(num_kept=4), folder=str(tmp_path / "run"))
    (problem,) = plan(config, recover=RecoverConfig(engine="deepspeed")).problems
    assert str(problem).startswith("model.sharding: got 'single', expected 'zero3' for recover.engine deepspeed")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--recover.engine", "deepspeed"],
            "model.sharding: got 'single', expected 'zero3' for recover.engine deepspeed, and workers: --cluster",
        ),
        ([*WORKERS, "--model.sharding", "tensor_parallel"], "model.sharding: got 'tensor_parallel', expected 'zero3'"),
        (
            [*WORKERS, "--recover.methods", "closed_form,layerwise"],
            "recover.engine: got 'deepspeed', expected 'torch': closed_form, layerwise of recover.methods work in one",
        ),
        (
            [*WORKERS, "--model.offload", "nvme", "--model.offload_folder", "/tmp", "--recover.zero_stage", "2"],
            "recover.zero_stage: got 2, expected 3, as model.offload is 'nvme'",
        ),
        (
            [*WORKERS, "--cluster.gang_size", "9", "--recover.batch_size", "8"],
            "recover.batch_size: got 8, expected at least cluster.gang_size (9): each worker reads its share",
        ),
        ([*WORKERS, "--model.dtype", "float16"], "model.dtype: got 'float16', expected bfloat16 or float32"),
        ([*WORKERS, "--recover.train", "adapters"], "recover.train: got ['adapters'], expected no adapters and no"),
        ([*WORKERS, "--recover.train", "scales"], "recover.train: got ['scales'], expected no adapters and no scales"),
        ([*WORKERS, "--model.router", "eep"], "model.router: got 'eep', expected 'exported'"),
        (["--recover.engine", "jax"], "recover.engine: "),
        (["--recover.zero_stage", "1"], "recover.zero_stage: "),
        (["--cluster.address", "local"], "cluster.address: got 'local', expected none"),
    ],
)
def test_what_workers_cannot_do_is_refused_before_weights_are_read(
    words: list[str],
    expected: str,
    pruned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    capsys.readouterr()
    assert main(["recover", str(pruned), *OPTIONS, "--to", str(tmp_path / "to"), *words]) == 2
    assert expected in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_without_deepspeed_it_says_what_to_install(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero3.importlib.util, "find_spec", lambda _: None)
    assert main(["recover", str(pruned), *OPTIONS, *WORKERS, "--to", str(tmp_path / "to")]) == 2
    expected = "recover.engine: 'deepspeed' needs DeepSpeed; pip install moe_evo[deepspeed]"
    assert expected in capsys.readouterr().err


def test_workers_that_no_machine_has_room_for_are_refused(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORKERS, "--cluster.resources", "{CPU: 500}", "--recover.methods", "router"]
    assert main(["recover", str(pruned), *OPTIONS, *words, "--to", str(tmp_path / "to")]) == 2
    assert "cluster: the workers need 2 x (CPU 500), this machine has CPU " in capsys.readouterr().err

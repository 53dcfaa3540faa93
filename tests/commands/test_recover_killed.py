"""A recovery that is killed goes on, and nothing else works on it meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from recoveries import OPTIONS, SHORT, recover, weights

from moe_evo.cli.main import main
from moe_evo.commands import teaching
from moe_evo.recovery import training

PROGRAM = """
import sys
from moe_evo.cli.main import main
from moe_evo.recovery import training

step = training.Training._step

def slow_step(self, number):
    found = step(self, number)
    print("step", flush=True)
    sys.stdin.readline()
    return found

training.Training._step = slow_step
sys.exit(main(sys.argv[1:]))
"""


def test_killed_while_it_trains_it_goes_on_and_ends_with_the_same_checkpoint(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = recover(pruned, tmp_path / "whole", capsys=capsys)
    target = tmp_path / "killed"
    words = ["recover", str(pruned), *OPTIONS, *SHORT, "--to", str(target)]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for _ in range(6):
            assert process.stdout.readline() == "step\n"
            process.stdin.write("\n")
            process.stdin.flush()
        os.kill(process.pid, signal.SIGKILL)
    assert not target.exists() and (tmp_path / "killed.recovery" / "state-1.safetensors").is_file()
    asked: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teaching, "teach", lambda *_: asked.append("the full model was asked again"))
        got = recover(pruned, target, "--recover.batch_tokens", "4095", capsys=capsys)
    assert not asked
    for key in ("scores", "gained", "missing", "prompts", "positions"):
        one, two = got[key], expected[key]
        assert one == two, key
    assert [check["validation"] for check in got["stages"][-1]["learned"]["checks"]] == [
        check["validation"] for check in expected["stages"][-1]["learned"]["checks"]
    ]
    other = weights(tmp_path / "whole")
    assert all(torch.equal(one, other[name]) for name, one in weights(target).items())
    assert not (tmp_path / "killed.recovery").exists()


def test_work_of_another_recovery_is_neither_used_nor_lost(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_):
        raise KeyboardInterrupt

    target = tmp_path / "recovered"
    words = ["recover", str(pruned), *OPTIONS, *SHORT, "--to", str(target)]
    monkeypatch.setattr(training.Training, "_step", die)
    assert main(words) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert main([*words, "--recover.seed", "1"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "recovered.recovery: holds the work of another recovery (recover.seed: 0 -> 1); delete it, or" in line
    assert (tmp_path / "recovered.recovery" / "state-1.safetensors").is_file()
    foreign = tmp_path / "other.recovery"
    foreign.mkdir()
    (foreign / "mine").write_text("mine")
    assert main([*words[:-1], str(tmp_path / "other")]) == 2
    assert "other.recovery: holds other files; move them, or give another --to" in capsys.readouterr().err
    assert (foreign / "mine").read_text() == "mine"


def test_two_processes_do_not_work_on_the_same_recovery(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recover", str(pruned), *OPTIONS, *SHORT, "--to", str(tmp_path / "r")]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "step\n"
        started = time.monotonic()
        assert main(words) == 2
        assert time.monotonic() - started < 60
        process.kill()
    assert f"process {process.pid} is working on this run" in capsys.readouterr().err

"""`moe-evo doctor`: one line a check, each alone, and an exit code that tells whether a run can be made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from moe_evo import versions
from moe_evo.cli.main import main
from moe_evo.commands import doctor
from moe_evo.commands.doctor import Check, checks, require_nothing_broken
from moe_evo.errors import ConfigError
from moe_evo.models.families import FAMILIES
from moe_evo.models.forward import layer_halves

TESTED = {"locked": {"torch": "2.13.0", "deepspeed": "0.19.8"}, "oldest": {"torch": "2.9", "deepspeed": "0.19"}}


def test_everything_holds_here_and_json_says_so() -> None:
    command = [sys.executable, "-m", "moe_evo", "doctor", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "WANDB_API_KEY": "s" * 40}
    )
    assert done.returncode == 0 and done.stderr == ""
    found = {one["name"]: one for one in json.loads(done.stdout)["checks"]}
    assert {f"family {name}" for name in FAMILIES} <= set(found)
    assert not [one for one in found.values() if one["state"] == "broken"]
    assert found["ray cluster"]["detail"].startswith("a local one starts and answers")
    for name in ("embedded model", *(f"family {one}" for one in FAMILIES)):
        expected = "hooks, token trees, shared layers, prefixes and prompts hold"
        assert found[name]["state"] == "ok" and found[name]["detail"].endswith(expected)
    assert "key set" in found["wandb mode"]["detail"] and "sss" not in done.stdout


def only(monkeypatch: pytest.MonkeyPatch, *kept: str) -> None:
    """Leave the slow checks out."""
    for name in {"_ray", "_embedded_model", "_zero3", "_chromium"} - set(kept):
        monkeypatch.setattr(doctor, name, lambda: ("ok", "left out"))
    monkeypatch.setattr(doctor, "_families", lambda: ["mixtral"])


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """By what stands behind the state in each printed line, its state."""
    printed = capsys.readouterr().out.splitlines()
    return {line[8:].strip(): line[:8].strip() for line in printed}


def test_what_is_broken_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch)

    def fails() -> tuple[str, str]:
        raise ConnectionError("the port\n is taken")

    monkeypatch.setattr(doctor, "_ray", fails)
    assert main(["doctor"]) == 2
    captured = capsys.readouterr()
    assert "broken  ray cluster         ConnectionError: the port is taken\n" in captured.out
    assert "ok      family mixtral" in captured.out, "the checks behind it are made"
    assert captured.err == "moe-evo: error: doctor: broken here: ray cluster; see the lines above\n"


def test_what_the_self_check_switches_off_is_a_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch, "_embedded_model")
    mix = layer_halves.LayerHalves.mix
    monkeypatch.setattr(layer_halves.LayerHalves, "mix", lambda *given: mix(*given) * 1.01)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name in ("embedded model", "family mixtral"):
        assert f"note    {name:<20}self-check: no shared layers: every genome is run from the first layer on" in printed


@pytest.mark.parametrize(
    ("installed", "state", "detail"),
    [
        ("2.13.1", "ok", "2.13.1 (tested: 2.9 to 2.13.0)"),
        ("2.14.0+cu130", "note", "2.14.0+cu130 is newer than what was tested (tested: 2.9 to 2.13.0); if something"),
        ("2.8.9", "broken", "2.8.9 is too old (tested: 2.9 to 2.13.0); install the tested versions"),
        (None, "broken", "not installed; install the tested versions"),
    ],
)
def test_versions_are_held_against_the_tested_ones(
    monkeypatch: pytest.MonkeyPatch, installed: str | None, state: str, detail: str
) -> None:
    monkeypatch.setattr(doctor, "tested_versions", lambda: TESTED)
    monkeypatch.setattr(doctor, "installed_version", lambda package: installed)
    found = doctor._package("torch", None)
    assert found[0] == state and found[1].startswith(detail)


def test_an_extra_that_is_not_installed_is_absent_and_says_what_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda package: None)
    expected = "needed for model.sharding zero3: pip install 'moe_evo[deepspeed]'"
    assert doctor._package("deepspeed", "deepspeed") == ("absent", expected)


def test_a_driver_that_torch_cannot_use_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: "580.1")
    assert doctor._gpu() == (
        "note", f"driver 580.1 is here, but torch {torch.__version__} cannot use it; install a CUDA build",
    )  # fmt: skip


def test_the_driver_is_what_nvidia_smi_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for nvidia-smi: there is no GPU here."""
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    answers: list[tuple[int, str]] = [(0, "580.159.04\n580.159.04\n"), (9, "no driver"), (0, "\n")]

    def run(command: Sequence[str], **_: object) -> SimpleNamespace:
        assert command[0] == "nvidia-smi"
        code, text = answers.pop(0)
        return SimpleNamespace(returncode=code, stdout=text)

    monkeypatch.setattr(doctor.subprocess, "run", run)
    assert [doctor._nvidia_driver() for _ in range(3)] == ["580.159.04", "", ""]


def test_little_memory_or_disk_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_evo.models.free_memory.free_bytes", lambda device: 2**29)
    assert doctor._memory() == ("note", "0.5 GiB free for this process, limits of containers counted")
    monkeypatch.setattr("moe_evo.models.free_memory.free_bytes", lambda device: None)
    assert doctor._memory()[0] == "ok"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**28))
    assert doctor._disk()[0] == "note"


def test_checks_come_one_by_one() -> None:
    assert next(checks()).name == "python"


def test_only_what_is_broken_is_an_error() -> None:
    require_nothing_broken([Check("a", "ok", ""), Check("b", "note", ""), Check("c", "absent", "")])
    with pytest.raises(ConfigError, match="broken here: a, d"):
        require_nothing_broken([Check("a", "broken", ""), Check("d", "broken", "")])


def test_needed_packages_are_those_of_every_installation_and_of_extras() -> None:
    needed = versions.needed_packages()
    assert needed["torch"] is None and needed["transformers"] is None
    assert needed["deepspeed"] == "deepspeed" and needed["lm-eval"] == "lm_eval"
    assert "pytest" not in needed, "what only developers need is none of a run's"

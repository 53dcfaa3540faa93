"""Every command of the command line where the terminal, and the whole locale, know ASCII alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model
from tiny_tasks import tiny_tokenizer

from moe_evo.cli.actions import ACTIONS

TASK = '[{data: syll, name: "wörter →", num_search: 8, num_validation: 4, num_test: 4}]'
SCORED = ("--tasks", TASK, "--model.self_check", "false", "--evaluation.threads", "1")
SEARCHED = ("--search.evaluations", "4", "--selection.finalists", "2", "--selection.baselines", "[]")
SHORT = ("--recover.methods", "logits", "--recover.steps", "2", "--recover.batch_size", "4", "--recover.checks", "1")

COMMANDS: dict[str, tuple[str, ...]] = {
    "--help": (),
    "search": (*SCORED, *SEARCHED, "--folder", "ünder/run"),
    "sweep": (*SCORED, *SEARCHED, "--sweep.seeds", "0,1", "--folder", "ünder/sweep", "--no-tune"),
    "plan": (*SCORED, "--folder", "ünder/planned"),
    "tasks": ("check", *SCORED[:2]),
    "tasks preview": ("preview", *SCORED[:2]),
    "evaluate": ("ünder/run", "--baseline", "full", "--samples", "ünder/samples.jsonl"),
    "prune": (*SCORED, "--method", "reap", "--num_kept", "4", "--to", "ünder/pruned"),
    "recover": ("ünder/pruned", *SCORED, *SHORT, "--to", "ünder/recovered"),
    "compress": ("ünder/pruned", *SCORED, "--method", "moe_pruner", "--to", "ünder/sparse"),
    "carve": ("ünder/dense", *SCORED, "--num_experts", "4", "--to", "ünder/carved"),
    "criteria": (),
    "show": ("ünder/run",),
    "show a sweep": ("ünder/sweep",),
    "compare": ("ünder/run", "ünder/sweep"),
    "report": ("ünder/run", "ünder/sweep", "--to", "ünder/report.html"),
    "export": ("ünder/run", "--to", "ünder/small"),
    "wandb-replay": ("ünder/run", "--tracking.wandb", "offline"),
    "doctor": (),
}

DRIVER = """
import json, os, sys
from moe_evo.__main__ import run
from moe_evo.commands import doctor

for name in ("_ray", "_zero3", "_chromium"):  # slow, and each one line as all others
    setattr(doctor, name, lambda: ("ok", "left out"))
doctor._families = lambda: ["mixtral"]
for name, words in json.load(sys.stdin).items():
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        file = os.open(f"{name}.{number}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    sys.argv = ["moe-evo", *name.split(" ")[:1], *words]
    code = run()
    sys.stdout.flush(), sys.stderr.flush()
    open(f"{name}.code", "w").write(str(code))
"""


@pytest.fixture(scope="module", params=["stream", "locale"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every command was given, one after the other, and left what it printed and its exit code."""
    place = tmp_path_factory.mktemp(request.param)
    inner = "ünder" if request.param == "stream" else "under"  # a locale of ASCII has no other names of files
    tiny_model("llama", vocab_size=350, intermediate_size=64).save_pretrained(place / inner / "dense")
    tiny_tokenizer(bos=True).save_pretrained(place / inner / "dense")
    commands = {name: [word.replace("ünder", inner) for word in words] for name, words in COMMANDS.items()}
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON", "WANDB"))
    }
    variables = {
        "stream": {"PYTHONIOENCODING": "ascii"},
        "locale": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    }[request.param]
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "WANDB_MODE": "disabled", "COLUMNS": "80"}
    subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(commands),
        text=True,
        cwd=place,
        env=environment | variables | path,
        check=True,
    )
    return place


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_prints_ascii_alone_and_succeeds(command: str, folder: Path) -> None:
    out, err = ((folder / f"{command}.{number}").read_bytes() for number in (1, 2))
    assert (folder / f"{command}.code").read_text() == "0", err
    assert out.strip() and out.isascii() and err.isascii()
    assert b"Traceback" not in err and b"Error" not in out + err


def test_every_command_is_tried() -> None:
    assert {name.split(" ")[0] for name in COMMANDS} >= set(ACTIONS)

"""What tests of recovery share: options, the command, and what it left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_evo.cli.main import main

TASK = "[{data: syll, num_search: 40, num_validation: 24, num_test: 40}]"
OPTIONS = ("--model.self_check", "false", "--tasks", TASK, "--evaluation.threads", "1")
SHORT = ("--recover.steps", "12", "--recover.batch_size", "8", "--recover.checks", "3")
LOGITS = ("--recover.methods", "logits")


def recover(what: Path, target: Path, *words: str, capsys: pytest.CaptureFixture[str], options=OPTIONS) -> dict:
    capsys.readouterr()
    # a method reads of these what it needs, and the command refuses the others
    short = {"layerwise": SHORT[:2], "closed_form": ()}.get(words[-1] if words else "", SHORT)
    assert main(["recover", str(what), *options, *short, "--to", str(target), *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def scores_of(model: str | Path, capsys: pytest.CaptureFixture[str]) -> dict:
    capsys.readouterr()
    assert main(["evaluate", "--model.path", str(model), *OPTIONS, "--split", "test", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}

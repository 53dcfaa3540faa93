"""What a command says of wrong input, before it loads a model or writes anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from moe_evo.cli.main import main


def refusal(
    argv: Sequence[str],
    target: Path,
    module: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """The one line that ends `moe-evo ARGV`; module: the one that would load a model. target: what is not written."""
    monkeypatch.setattr(module, "load_evaluator", lambda *_: pytest.fail("a model was loaded"))
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert not target.exists()
    return line


def taken_folder(folder: Path) -> Path:
    """A folder that holds something else."""
    taken = folder / "TAKEN"
    taken.mkdir()
    (taken / "file").write_text("something else")
    return taken

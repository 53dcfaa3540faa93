"""What is printed can be printed anywhere, and never steers the terminal."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_evo.cli.main import main

OLD_RUNS = Path(__file__).parent.parent / "data" / "old_runs"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A finished run whose files hold escape sequences, markup, formulas, and letters beyond ASCII."""
    run = tmp_path / "=1+1 \x1b[31m"
    shutil.copytree(OLD_RUNS / "finished", run)
    result = json.loads((run / "result.json").read_text())
    result["rows"][0]["title"] = "\x1b]0;owned\x07[/x] [bold]é→█"
    result["search"]["failure_reasons"] = ["\x1b[2J[red]broken"]
    (run / "result.json").write_text(json.dumps(result))
    return run


@pytest.mark.parametrize("command", [["show"], ["compare"], ["show", "--json"], ["compare", "--format", "csv"]])
def test_texts_from_files_are_shown_and_never_steer(
    command: list[str], hostile: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # where no title is wrapped
    assert main([command[0], str(hostile), *command[1:]]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out
    assert "[/x] [bold]é→█" in (out if "--json" not in command else json.loads(out)["rows"][0]["title"])


def test_errors_never_steer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "\x1b[31m/\nnowhere"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("moe-evo: error: \\x1b[31m/ nowhere") and err.count("\n") == 1


def test_cells_are_no_formulas(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads((hostile / "result.json").read_text())
    for row, title in zip(result["rows"], ("=cmd()", "+1", "-1", "@a"), strict=False):
        row["title"] = title
    (hostile / "result.json").write_text(json.dumps(result))
    assert main(["compare", str(hostile), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["title"] for row in rows} >= {"'=cmd()", "'+1", "'-1", "'@a"}
    assert all(row["run"].startswith("'=1+1 \\x1b") for row in rows)
    assert any(float(row["test"]) for row in rows)


@pytest.mark.parametrize("command", ["show", "compare", "criteria", "--help"])
@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
    ids=str,
)
def test_every_command_writes_on_a_terminal_without_unicode(
    command: str, variables: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "é"
    shutil.copytree(OLD_RUNS / "finished", run)
    words = [command, str(run)] if command in ("show", "compare") else [command]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))
    }
    done = subprocess.run(
        [sys.executable, "-m", "moe_evo", *words], capture_output=True, check=False, env=environment | variables
    )
    assert done.returncode == 0, done.stderr
    if "latin-1" not in str(variables):
        assert done.stdout.isascii() and done.stderr.isascii()
    if command == "show":
        assert b"##" in done.stdout  # the picture of kept experts


def test_a_name_that_no_encoding_holds_is_one_line() -> None:
    words = [sys.executable.encode(), b"-m", b"moe_evo", b"show", b"/no/\xff\xfe"]
    done = subprocess.run(words, capture_output=True, check=False)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"\\udcff" in done.stderr

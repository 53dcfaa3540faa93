"""What `make` does with the environment, seen with programs that only write down what is asked of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from lock import ROOT

PYTHON = """#!/bin/sh
echo "$(basename "$0") $*" >> calls
case "$*" in
  *venv*)
    rm -rf .venv; mkdir -p .venv/bin
    printf '#!/bin/sh\\necho pip "$*" >> calls\\n' > .venv/bin/pip; chmod +x .venv/bin/pip ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The Makefile and what it reads, with stand-ins for two Pythons."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "programs").mkdir()
    for name in ("python3", "python3.12"):
        (tmp_path / "programs" / name).write_text(PYTHON)
        (tmp_path / "programs" / name).chmod(0o755)
    return tmp_path


def made(project: Path, *arguments: str, target: str = ".venv/ready") -> list[str]:
    """What was called."""
    (project / "calls").write_text("")
    environment = {**os.environ, "PATH": f"{project / 'programs'}:{os.environ['PATH']}"}
    for name in ("PYTHON", "TORCH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
        environment.pop(name, None)
    subprocess.run(["make", target, *arguments], cwd=project, env=environment, check=True, capture_output=True)
    return (project / "calls").read_text().splitlines()


def environments(calls: list[str]) -> list[str]:
    return [call for call in calls if "venv" in call and not call.startswith("pip")]


def locked_torch(project: Path) -> str:
    lines = (project / ".venv" / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch"))


def test_an_environment_is_made_once(project: Path) -> None:
    assert environments(made(project)) == ["python3 -m venv --clear .venv"]
    assert made(project) == []


def test_another_torch_or_python_than_before_makes_it_anew_and_none_takes_what_is_there(project: Path) -> None:
    made(project)
    assert environments(made(project, "TORCH=torch==2.12.0")) == ["python3 -m venv --clear .venv"]
    assert locked_torch(project) == "torch==2.12.0"
    assert made(project, "TORCH=torch==2.12.0") == []
    assert made(project) == []
    assert environments(made(project, "PYTHON=python3.12", "TORCH=torch")) == ["python3.12 -m venv --clear .venv"]
    assert locked_torch(project) == "torch"


def test_clean_leaves_the_runs(project: Path) -> None:
    made(project, "PYTHON=python3.12")
    (project / "runs").mkdir()
    made(project, target="clean")
    assert not list(project.glob(".venv*"))
    assert (project / "runs").is_dir()

"""The GPU benchmark: its small form on the CPU, without what a bare machine lacks, and how it keeps to its time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LACKING = ("ray", "wandb", "jsonargparse", "bokeh", "moocore", "lm_eval", "deepspeed", "pytest")
WITHOUT_THEM = """
import runpy, sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(",")))  # None: not to be imported
sys.path.insert(0, "benchmarks")
sys.argv[0] = "benchmarks/gpu.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_THEM, ",".join(LACKING), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """All figures, and what was printed."""
    path = tmp_path_factory.mktemp("gpu") / "figures.json"
    done = run_benchmark("--small", "--to", str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text("utf-8")), done.stdout


def test_every_section_of_the_small_form_has_its_figures(small: tuple[dict[str, Any], str]) -> None:
    sections = small[0]["sections"]
    points = {name: len(section["figures"]) for name, section in sections.items()}
    assert list(points) == [
        "ceilings", "correctness", "scoring", "attention", "decode", "merging", "out_of_memory", "baselines",
        "recovery",
    ]  # fmt: skip
    assert points["correctness"] == 4 * 6
    assert points["scoring"] == 2 * (2 * 5 + 3)
    assert points["baselines"] == 2 * 5
    assert points["recovery"] == 3 + 4
    assert min(points.values()) >= 1
    failed = {point: error for section in sections.values() for point, error in section.get("failed", {}).items()}
    assert failed == {}


def test_what_only_a_gpu_has_is_left_out_with_the_reason(small: tuple[dict[str, Any], str]) -> None:
    sections = small[0]["sections"]
    assert sections["attention"]["skipped"]["cuDNN"] == "only a GPU has it"
    assert len(sections["out_of_memory"]["skipped"]) == 4
    assert all("only a GPU" in reason for reason in sections["out_of_memory"]["skipped"].values())
    assert len(sections["recovery"]["skipped"]) == 1


def test_engine_and_baselines_score_the_same_with_float32(small: tuple[dict[str, Any], str]) -> None:
    sections = small[0]["sections"]
    found = [point["relative"] for point in sections["correctness"]["figures"].values() if "relative" in point]
    assert max(found) < 1e-5
    same = [point["same_scores"] for point in sections["baselines"]["figures"].values() if "same_scores" in point]
    assert same == [1.0] * 6


def test_what_is_learned_lowers_the_loss_on_what_is_not(small: tuple[dict[str, Any], str]) -> None:
    points = small[0]["sections"]["recovery"]["figures"].values()
    losses = [(point["loss_before"], point["loss_after"]) for point in points if "loss_before" in point]
    assert len(losses) == 3 and all(after < before for before, after in losses)


def test_tables_come_first_and_one_line_of_json_last(small: tuple[dict[str, Any], str]) -> None:
    *tables, line = small[1].splitlines()
    figures = json.loads(line)
    assert tables[0].startswith("card ") and "transformers" in tables[0]
    assert figures["benchmark"] == "gpu"
    assert figures["scoring"]["olmoe, 64 tokens, 1 genome"] > 0


def test_sections_for_which_no_time_is_left_say_so(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    done = run_benchmark("--small", "--minutes", "0", "--sections", "ceilings", "correctness", "--to", str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    for section in json.loads(path.read_text("utf-8"))["sections"].values():
        assert "figures" not in section
        assert all("used up" in reason for reason in section["skipped"].values())


def test_a_point_that_fails_is_written_down_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from gpu_sections.record import Record

    def fail() -> dict[str, float]:
        raise RuntimeError("CUDA error:\nan illegal memory access")

    saved: list[str] = []
    record = Record(10.0, lambda: saved.append("saved"))
    points: dict[str, Callable[[], dict[str, float]]] = {"wrong": fail, "right": lambda: {"ms": 1.0}}
    assert [record.attempt(name, measure) for name, measure in points.items()] == [False, True]
    assert not record.attempt("long", lambda: {"ms": 1.0}, needs_s=20.0)
    found = record.to_json()
    assert found["figures"] == {"right": {"ms": 1.0}}
    assert found["failed"]["wrong"]["message"] == "CUDA error: an illegal memory access"
    assert "fail" in found["failed"]["wrong"]["traceback"][-4]
    assert list(found["skipped"]) == ["long"] and len(saved) == 3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("", 0),
        ("record.fail(RuntimeError('gone'))", 1),
        ("record.attempt('halves', lambda: 1 / 0)", 1),
        ("record.attempt('halves', lambda: {'differs': 'logits differ by 0.5'})", 1),
        ("record.attempt('halves', lambda: {'differs': ''})", 0),
    ],
)
def test_scores_that_are_not_right_are_in_the_exit_code(change: str, expected: int) -> None:
    script = f"""
import sys
sys.path.insert(0, "benchmarks")
import gpu

def correctness(bench, record):
    {change or "pass"}

gpu.SECTIONS = {{"correctness": (correctness, 1.0)}}
sys.exit(gpu.main(["--small", "--minutes", "1", "--sections", "correctness"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == expected, done.stderr[-3000:]


def test_a_section_that_does_not_end_is_ended_and_the_next_one_runs() -> None:
    script = """
import sys, time
sys.path.insert(0, "benchmarks")
import gpu

def endless(bench, record):
    while True:
        time.sleep(0.01)

gpu._GRACE_S = 0.1
gpu.SECTIONS = {"ceilings": (endless, 0.5), "attention": (lambda bench, record: None, 0.5)}
sys.exit(gpu.main(["--small", "--minutes", "0", "--sections", "ceilings", "attention"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "failed: the section: OutOfTime" in done.stdout
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["ceilings"] == {"failed": ["the section"]}
    assert line["attention"] == {}

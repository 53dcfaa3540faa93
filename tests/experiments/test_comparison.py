"""The scripts that compare searches: equal cost, redrawn splits, and what their tables say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from moe_evo.config.task import TaskConfig
from moe_evo.tasks.data import read_task

EXPERIMENTS = Path(__file__).parents[2] / "experiments" / "embedded"


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return importlib.import_module("comparison")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return importlib.import_module("fresh_examples")


def cell(comparison: ModuleType, folder: Path, **changes: object) -> object:
    values = {"model": "embedded", "task": "nli", "num_kept": 4, "seed": 0, "evaluations": 12, "folder": str(folder)}
    return comparison.Cell(**values | changes)


def test_a_seed_redraws_what_is_searched_on_and_leaves_the_test_split(comparison: ModuleType, tmp_path: Path) -> None:
    drawn = [
        read_task(TaskConfig(name="nli", data=str(comparison.redrawn(cell(comparison, tmp_path, seed=seed)))))
        for seed in (0, 1)
    ]
    whole = read_task(TaskConfig(data="nli"))

    def keys(data: object, *splits: str) -> set[object]:
        return {one.key for split in splits for one in data.splits[split]}

    for data in drawn:
        assert keys(data, "search", "validation") == keys(whole, "search", "validation")
        assert [len(data.splits[split]) for split in data.splits] == [300, 320, 700]
        assert keys(data, "test") == keys(whole, "test")
    assert keys(drawn[0], "search") != keys(drawn[1], "search")


def test_all_searches_of_a_cell_read_as_many_examples(comparison: ModuleType, tmp_path: Path) -> None:
    """A real cell: every method on the embedded model, with few evaluations."""
    found = comparison.run_cell(cell(comparison, tmp_path))
    assert set(found) == set(comparison.METHODS)
    forwards = {name: found[name].forwards for name in comparison.SEARCHES}
    forwards["around"] -= 300 + len(comparison.CRITERIA) * 320  # what choosing the criterion took
    assert found["one_shot"].forwards == 300 + len(comparison.CRITERIA) * 320
    spread = max(forwards.values()) - min(forwards.values())
    assert spread <= 3 * 320 and min(forwards.values()) > 12 * 300  # finalists can be fewer
    assert all(len(one.examples) == 700 and one.test == pytest.approx(np.mean(one.examples)) for one in found.values())
    assert comparison.run_cell(cell(comparison, tmp_path)) == found  # read back


def test_the_table_names_the_best_other_method_and_its_interval(comparison: ModuleType, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    results = {}
    level = {"full": 0.9, "one_shot": 0.5, "random": 0.6, "around": 0.55, "eep_release": 0.6, "eep": 0.65}
    for task, gain in (("nli", 0.10), ("syll", -0.05)):
        for num_kept in (2, 4):
            for seed in (0, 1, 2):
                drawn = rng.random(700)
                chances = {**level, "surrogate": level["eep"] + gain}
                results[cell(comparison, tmp_path, task=task, num_kept=num_kept, seed=seed)] = {
                    name: comparison.Found(chance + 0.03, chance + 0.02, float((drawn < chance).mean()),
                                           tuple((drawn < chance).astype(float)), 1000)
                    for name, chance in chances.items()
                }  # fmt: skip
    text = comparison.table(results)
    assert text.index("**4 of 8 experts kept**") < text.index("**2 of 8 experts kept**")
    assert "| **EEP, ours** (the best other) | +0.02" in text and "(syll) |" in text
    value, low, high, worst, task = comparison._gain(results, "eep")
    assert value == pytest.approx(0.025, abs=0.01) and worst == pytest.approx(-0.05, abs=0.02) and task == "syll"
    # with two tasks that differ so much, the interval is about as wide as the tasks are apart
    assert low == pytest.approx(-0.05, abs=0.02) and high == pytest.approx(0.10, abs=0.02)


def test_fresh_and_fixed_ways_read_as_many_examples(fresh: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "data" / "nli"
    source.mkdir(parents=True)
    for split, number in (("train", 3100), ("validation", 20), ("test", 20)):
        rows = ({"prompt": f"{split} {n}", "choices": ["a", "b"], "label": n % 2} for n in range(number))
        (source / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for way in fresh.WAYS:
        one = fresh.Cell("embedded-fine", 8, "nli", 0, way, str(tmp_path / "data"), str(tmp_path / "runs")).config
        seen = one.evaluation.sample_size if one.evaluation.is_fresh else one.tasks[0].num_search
        assert seen * one.search.evaluations == fresh.FORWARDS
        assert len(read_task(one.tasks[0]).splits["search"]) == (3000 if one.evaluation.is_fresh else 300)


def test_the_fresh_table_has_a_line_a_way(fresh: ModuleType) -> None:
    results = {
        fresh.Cell("embedded-fine", 8, task, seed, way, "", ""): fresh.Found(0.8, 0.7 + 0.01 * seed)
        for task in ("arith", "nli")
        for seed in (0, 1)
        for way in fresh.WAYS
    }
    lines = fresh.table(results).splitlines()
    assert len(lines) == 2 + len(fresh.WAYS)
    wanted = "| surrogate, fresh | 75 | 800 | 0.705 (0.700 to 0.710) | 0.705 (0.700 to 0.710) | 0.705 | +0.095 |"
    assert wanted in lines


def test_a_table_is_written_between_its_marks(comparison: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- comparison: begin -->\nold\n<!-- comparison: end -->\nafter\n")
    comparison.write_between_marks(path, "comparison", "new")
    assert path.read_text() == "before\n<!-- comparison: begin -->\nnew\n<!-- comparison: end -->\nafter\n"

"""What is told before a search spends its time: small splits, and tasks that the full model cannot do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from moe_evo.cli.main import main
from moe_evo.config.task import TaskConfig
from moe_evo.runs.early_warnings import split_warnings
from moe_evo.tasks.chance import chance_level
from moe_evo.tasks.data import check_tasks


def sized(*sizes: int, task: str = "nli") -> TaskConfig:
    return TaskConfig(data=task, num_search=sizes[0], num_validation=sizes[1], num_test=sizes[2])


def test_each_small_split_is_told_with_what_it_means() -> None:
    assert split_warnings(check_tasks([sized(300, 200, 400)]), "mean") == []
    assert split_warnings(check_tasks([sized(100, 100, 100)]), "mean") == []
    search, validation, test = split_warnings(check_tasks([sized(40, 30, 56)]), "mean")
    assert search.startswith("warning: only 40 search examples (a search learns so few by heart")
    assert validation.startswith("warning: only 30 validation examples (they choose the winner")
    assert test.startswith("warning: only 56 test examples (")
    # half of the 95 % interval of a share of 0.5
    assert f"to ±{1.96 * np.sqrt(0.25 / 56):.2f}, 390 tell it to ±0.05; give 100 or more" in test
    assert np.sqrt(0.25 / 390) * 1.96 < 0.05


def test_several_tasks_count_together_unless_the_worst_one_counts() -> None:
    data = check_tasks([sized(60, 60, 60), sized(60, 60, 60, task="syll")])
    assert split_warnings(data, "mean") == []
    lines = split_warnings(data, "worst")
    assert len(lines) == 3 and lines[0].startswith("warning: only 60 search examples a task (")


def test_of_scores_that_are_no_shares_no_margin_is_told() -> None:
    data = check_tasks([TaskConfig(data="nli", kind="distillation", num_test=20)])
    (line,) = split_warnings(data, "mean")
    assert "±" not in line


def test_guessing_scores_the_mean_over_examples_of_one_over_the_number_of_choices() -> None:
    (data,) = check_tasks([sized(0, 0, 0, task="city")])
    examples = data.splits["test"]
    rng = np.random.default_rng(0)
    guessed = [rng.integers(len(one.choices), size=400) == one.label for one in examples]
    for metric in ("accuracy", "probability_norm"):
        assert chance_level(metric, examples) == pytest.approx(np.mean(guessed), abs=0.01)
    for metric in ("log_likelihood", "exact_match"):
        assert chance_level(metric, examples) is None
    assert chance_level("accuracy", []) is None


def _labels(folder: Path, *, right: bool) -> Path:
    """Syllogisms of nli, with the labels of each split in the right or in a senseless order."""
    import moe_evo

    source = Path(moe_evo.__file__).parent / "data" / "tasks" / "nli"
    (folder / "t").mkdir()
    for split in ("search", "validation", "test"):
        rows = [json.loads(line) for line in (source / f"{split}.jsonl").read_text().splitlines()][:120]
        for number, row in enumerate(rows):
            row["label"] = row["label"] if right else number % 2
        (folder / "t" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "t"


SEARCH = ["--search.evaluations", "2", "--selection.finalists", "1", "--search.num_kept", "4", "--selection.baselines",
          "[]", "--evaluation.threads", "1"]  # fmt: skip


@pytest.mark.parametrize("right", [True, False])
def test_a_full_model_that_guesses_is_told_before_the_search_with_three_of_its_answers(
    right: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _labels(tmp_path, right=right)
    assert main(["search", "--tasks", str(data), *SEARCH, "--folder", str(tmp_path / "run")]) == 0
    before, _ = capsys.readouterr().err.split("search (surrogate)", 1)
    found = re.findall(r"warning: the full model is not told from guessing, which scores 0.500: accuracy .*", before)
    answers = re.findall(r"^  it answered: '.*valid:' -> ' (?:yes|no)', right is ' (?:yes|no)'$", before, re.M)
    assert (len(found), len(answers)) == ((0, 0) if right else (1, 3))
    assert right or "of t, on 120 search examples" in found[0]


def test_a_full_model_that_generates_no_right_answer_is_told_with_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Say {n}:", "answers": [f"never {n}"]} for n in range(60)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = json.dumps([{"data": str(tmp_path / "t.jsonl"), "max_new_tokens": 3}])
    assert main(["search", "--tasks", task, *SEARCH, "--folder", str(tmp_path / "run")]) == 0
    error = capsys.readouterr().err
    assert "warning: the full model scores 0 by exact_match of t, on " in error
    assert len(re.findall(r"^  it answered: 'Say \d+:' -> .*, right is 'never \d+'$", error, re.M)) == 3
    assert "warning: only " in error and error.index("warning: only ") < error.index("loading embedded")
    assert main(["plan", "--tasks", task, *SEARCH, "--folder", str(tmp_path / "other")]) == 0
    assert "search examples (a search learns so few by heart" in capsys.readouterr().out

"""`moe-evo tasks`: examples as the model reads them, and what there is to say about them before a search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_evo.cli.main import main
from moe_evo.commands.tasks import check, preview
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import ScoringConfig
from moe_evo.config.task import TaskConfig
from moe_evo.models.source import ModelSource
from moe_evo.records.resolution import smallest_gain
from moe_evo.tasks.data import read_task
from moe_evo.tracking.base import Trackers

KINDS = ["nli", {"data": "syll", "kind": "generation"}]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["tasks", *words])
    return (code, *capsys.readouterr())


def test_examples_are_shown_with_tokens_and_answers_and_scores(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = printed(capsys, "preview", "--tasks", json.dumps(KINDS), "--answers", "--json")
    choice, generation = json.loads(out)
    assert code == 0 and (choice["name"], generation["name"]) == ("nli", "syll")
    assert len(choice["examples"]) == len(generation["examples"]) == 3
    for one, expected in zip(choice["examples"], read_task(TaskConfig(data="nli")).splits["search"], strict=False):
        assert one["text"] == expected.prompt and one["right"] == [expected.choices[expected.label or 0]]
        assert ["".join(row["scored"]) for row in one["rows"]] == [" no", " yes"]
        assert all("".join(row["read"]).endswith(expected.prompt) for row in one["rows"])
        assert one["score"] == float(one["given"] in one["right"])
    for one in generation["examples"]:
        (row,) = one["rows"]
        assert row["scored"] == [] and "".join(row["read"]).endswith(one["text"])
        assert one["score"] == float(one["given"].strip() == one["right"][0].strip())


def test_what_is_printed_says_where_scoring_starts(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = printed(capsys, "preview", "--tasks", json.dumps(KINDS))
    assert code == 0
    assert out.count(" search examples, nli/search.jsonl:") == 3
    assert out.count("'valid' ':' | scored: ' no'\n") == 3 and out.count("| generation starts\n") == 3
    assert "answered" not in out


def test_a_preview_needs_no_weights_and_an_answer_does(tmp_path: Path) -> None:
    whole = ModelSource(ModelConfig()).location
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (file := Path(whole, name)).is_file():
            (tmp_path / name).write_bytes(file.read_bytes())
    config = ScoringConfig(model=ModelConfig(path=str(tmp_path)), tasks=[TaskConfig(data="arith")])
    (found,) = preview(config, Trackers([]), answers=False)
    assert all(row.read and row.scored for one in found.examples for row in one.rows)
    assert found.examples[0].given is None


def test_a_check_tells_sizes_balance_and_resolution_without_a_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = printed(
        capsys, "check", "--tasks", "[{data: nli, num_test: 56}]", "--model.path", "/nowhere", "--json"
    )
    assert code == 0
    (task,), warnings = (json.loads(out)[name] for name in ("tasks", "warnings"))
    data = read_task(TaskConfig(data="nli", num_test=56))
    for split, told in task["splits"].items():
        examples = data.splits[split]
        labels = [one.label for one in examples]
        assert told["facts"]["examples"] == len(examples) and told["chance"] == 0.5
        assert told["facts"]["labels"] == [labels.count(0), labels.count(1)]
        assert told["facts"]["answer"][1] == max(labels.count(0), labels.count(1)) / len(labels)
    test = task["splits"]["test"]
    assert test["margin"] == pytest.approx(0.98 / 56**0.5, abs=1e-3) and test["gain"] == smallest_gain(56)
    assert task["hash"] == data.hash
    (warning,) = warnings
    assert warning.startswith("warning: only 56 test examples (")
    assert main(["tasks", "check", "--tasks", "[{data: nli, num_test: 56}]"]) == 0
    out = capsys.readouterr().out
    assert " 56 " in out and "±0.131" in out and warning in out
    assert main(["plan", "--tasks", "[{data: nli, num_test: 56}]"]) == 0
    line = f"56 test; a test score is told to ±0.131, a gain of {smallest_gain(56):.3f} from chance\n"
    assert f"task        nli (choice, accuracy): 300 search, 320 validation, {line}" in capsys.readouterr().out


def write(path: Path, rows: list[Any]) -> TaskConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskConfig(data=str(path))


def test_a_check_counts_what_stands_there_twice(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n // 2}", "answers": [f"a{n}"]} for n in range(80)]
    splits = check(ScoringConfig(tasks=[write(tmp_path / "t.jsonl", rows)])).tasks[0].splits
    assert sum(one.facts.examples for one in splits.values()) == 80
    assert all(one.facts.repeated * 2 == one.facts.examples and one.chance is None for one in splits.values())
    assert all(one.facts.labels == () for one in splits.values())


@pytest.mark.parametrize(
    ("label", "told"),
    [
        (lambda n: 1 + n % 3, "has the label 0, of 0 to 3 (do labels count from 1?)"),
        (lambda n: n % 3, "has the label 3, of 0 to 3"),
        (
            lambda n: 0 if n % 10 else 1 + n // 10 % 3,
            "'a' is right in 90% of t, which a model scores that says only this",
        ),
    ],
)
def test_labels_that_look_like_a_mistake_are_told(tmp_path: Path, label: Any, told: str) -> None:
    rows = [{"prompt": f"p{n}", "choices": ["a", "b", "c", "d"], "label": label(n)} for n in range(600)]
    warnings = check(ScoringConfig(tasks=[write(tmp_path / "t.jsonl", rows)])).warnings
    assert [line for line in warnings if told in line] == list(warnings[-1:])
    assert warnings[-1].startswith("warning: ")


def test_texts_have_no_shares_and_say_so_by_leaving_them_out(tmp_path: Path) -> None:
    found = check(ScoringConfig(tasks=[write(tmp_path / "t.jsonl", [{"text": f"t{n}"} for n in range(600)])]))
    assert found.warnings == ()
    assert all(
        one.margin is None and one.gain is None and one.facts.answer is None for one in found.tasks[0].splits.values()
    )


def test_a_search_begins_with_what_its_tasks_can_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tasks", "[{data: nli, num_search: 8, num_validation: 8, num_test: 100}]", "--search.evaluations", "2"]
    words += ["--selection.finalists", "1", "--selection.baselines", "[]", "--folder", str(tmp_path / "run")]
    assert main(["search", *words]) == 0
    told = capsys.readouterr().err
    line = "task nli: 8 search, 8 validation, 100 test examples; a test score is told to ±0.098, a gain of "
    line += f"{smallest_gain(100):.3f} from chance"
    assert line in told and told.index(line) < told.index("loading embedded")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "tasks: got '', expected check or preview"),
        (("chek",), "tasks: got 'chek', expected check or preview"),
        (("preview", "--tasks", "[nli, nli]"), "got the name 'nli' twice"),
        (("preview", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(capsys: pytest.CaptureFixture[str], words: Any, told: str) -> None:
    code, out, err = printed(capsys, *words)
    assert (code, out) == (2, "") and told in err.splitlines()[-1] and "Traceback" not in err

"""`moe-evo tasks`: examples as the model reads them, and what there is to say about them before a search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_evo.cli.main import main
from moe_evo.commands.tasks import preview
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import ScoringConfig
from moe_evo.config.task import TaskConfig
from moe_evo.models.source import ModelSource
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


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "tasks: got '', expected preview"),
        (("chek",), "tasks: got 'chek', expected preview"),
        (("preview", "--tasks", "[nli, nli]"), "got the name 'nli' twice"),
        (("preview", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(capsys: pytest.CaptureFixture[str], words: Any, told: str) -> None:
    code, out, err = printed(capsys, *words)
    assert (code, out) == (2, "") and told in err.splitlines()[-1] and "Traceback" not in err

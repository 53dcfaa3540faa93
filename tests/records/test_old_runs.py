"""Folders of runs that an older version made are shown, compared, reported, exported and gone on with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moe_evo
from moe_evo.cli.main import main
from moe_evo.errors import RunError
from moe_evo.records.folder import RunFolder
from moe_evo.records.journal import Journal

OLD = Path(__file__).parent.parent / "data" / "old_runs"
"""`finished`: 6 evaluations that keep 4 of 8 experts; `unfinished`: the same search, interrupted after 4."""


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD / "finished", tmp_path / "finished"))


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD / "unfinished", tmp_path / "unfinished"))


def test_both_are_shown(finished: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(finished)]) == 0
    told = capsys.readouterr().out
    assert "EEP prune + merge        4      6   0.833       0.750  0.667 [0.275, 0.913]" in told
    assert f"next     moe-evo export {finished} --to {finished}/checkpoint" in told
    assert main(["show", str(unfinished)]) == 0
    assert "4 of 6 evaluations done, 0 failed, best fitness 1.0000" in capsys.readouterr().out


def test_what_is_shown_as_json_is_what_lies_on_disk(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(finished), "--json"]) == 0
    shown, stored = json.loads(capsys.readouterr().out), json.loads((finished / "result.json").read_text())
    assert {key: shown[key] for key in stored} == stored
    assert set(shown) - set(stored) <= {"against_full"}  # which older versions did not store


def test_they_are_compared_and_reported(
    finished: Path, unfinished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(finished), str(unfinished), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    lines = {(line["run"], line["key"]): line for line in found["lines"]}
    assert lines["finished", "best"]["test"] == pytest.approx(2 / 3)
    assert lines["unfinished", "best"]["state"] == "unfinished" and lines["unfinished", "best"]["evaluations"] == 4
    assert found["paired"][0]["reason"] == "not finished"
    assert main(["report", str(finished), str(unfinished), "--to", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "0.275 to 0.913" in text and "4 of 6" in text
    assert "<svg" in moe_evo.load_run(finished)._repr_html_()


def test_a_finished_one_is_exported_and_scored_again(finished: Path, tmp_path: Path) -> None:
    run = moe_evo.load_run(finished)
    exported = run.export(tmp_path / "small")
    assert exported.report.max_logit_difference < 1e-4 and exported.title == "EEP prune + merge"
    assert run.evaluate(split="test").score.fitness == pytest.approx(2 / 3)


def test_an_unfinished_one_goes_on_with_what_it_has(
    unfinished: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Journal(unfinished / "journal.sqlite", read_only=True) as journal:
        before = journal.outcomes("search", "search")
    assert main(["search", "--resume", str(unfinished)]) == 0
    assert "search (eep): 6 evaluations, 4 done before" in capsys.readouterr().err
    with Journal(unfinished / "journal.sqlite", read_only=True) as journal:
        after = journal.outcomes("search", "search")
    assert len(before) == 4 and len(after) == 6
    assert {number: after[number] for number in before} == before
    old, new = (moe_evo.load_run(one).result for one in (finished, unfinished))
    assert [row.key for row in new.rows] == [row.key for row in old.rows]
    assert new.best.candidate in after


def test_a_finished_one_stays_as_it_is(finished: Path) -> None:
    before = (finished / "result.json").read_bytes()
    assert main(["search", "--resume", str(finished)]) == 0
    assert (finished / "result.json").read_bytes() == before


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(result: dict[str, Any]) -> None:
        part: Any = result
        for key in path[:-1]:
            part = part[int(key) if key.lstrip("-").isdigit() else key]
        del part[path[-1]]

    return change


def changed(finished: Path, *changes: Callable[[dict[str, Any]], None]) -> RunFolder:
    result = json.loads((finished / "result.json").read_text())
    for change in changes:
        change(result)
    (finished / "result.json").write_text(json.dumps(result))
    return RunFolder(finished)


def test_what_older_versions_did_not_write_takes_its_default_and_what_is_unknown_is_left_out(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("software", "fitness", "router", "experts", "dynamic_skipping", "winners_curse", "gangs")
    inner = [("search", "stopped_early"), ("rows", "-1", "parameters"), ("rows", "-1", "bytes")]
    before = RunFolder(finished).read_result()
    folder = changed(
        finished,
        *(without(name) for name in names),
        *(without(*path) for path in inner),
        lambda result: result.update({"colour": "blue"}),
        lambda result: result["rows"][0].update({"mood": 7}),
    )
    result = folder.read_result()
    assert result.best.scores == before.best.scores and result.winners_curse is None and result.best.parameters is None
    assert main(["show", str(finished)]) == 0
    assert main(["compare", str(finished), "--json"]) == 0
    assert main(["report", str(finished)]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("rows"), r"result\.json: rows: is missing; delete it and run the same search again"),
        (without("rows", "0", "scores", "test", "low"), r"result\.json: rows\[0\]\.scores\.test\.low: is missing; "),
        (lambda result: result.update(rows=[]), r"result\.json: rows: got none"),
        (lambda result: result.update(rows=7), r"result\.json: rows: got 7, expected a list of names with values; "),
        (lambda result: result["search"].update(seed="x"), r"search\.seed: got 'x', expected a whole number; "),
        (lambda result: result.update(version=99), r"result\.json: version 99, expected 1; use the moe_evo that"),
        (lambda result: result.update(gangs={"ready": "x"}), r"gangs\.ready: got 'x', expected a whole number; "),
    ],
)
def test_a_broken_result_is_one_line_that_says_what_to_do(
    change: Callable[[dict[str, Any]], None], message: str, finished: Path
) -> None:
    folder = changed(finished, change)
    with pytest.raises(RunError, match=message) as caught:
        folder.read_result()
    assert "\n" not in str(caught.value)

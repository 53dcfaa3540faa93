"""The page of a report: what it holds, that it needs no network, and that names in it are only ever text."""

from __future__ import annotations

import base64
import gzip
import json
import sqlite3
import subprocess
import sys
import time
import unicodedata
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from made_runs import LAYERS, make_run, shape_of, write_candidates

from moe_evo.cli.main import main
from moe_evo.errors import RunError
from moe_evo.records.journal import Journal
from moe_evo.report.page import render_page
from moe_evo.report.payload import MOST_POINTS, curve, run_payload
from moe_evo.report.record import read_records
from moe_evo.report.write import write_report

HOSTILE = "x'\"><img src=x onerror=alert(1)><script>alert(2)</script>{{7*7}}&lt;"


class Page(HTMLParser):
    """Elements with their attributes, text outside scripts, and the content of scripts by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.scripts: dict[str, str] = {}
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.elements.append((tag, given))
        self._inside = given.get("id", "?") if tag == "script" else tag if tag == "style" else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("", "style"):
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + data
        elif not self._inside:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def payload(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(self.scripts[f"data-{number}"])))
        return found


def page_of(*folders: Path) -> Page:
    return Page(render_page(read_records(folders)))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small real run of the embedded model."""
    folder = tmp_path_factory.mktemp("real") / "run"
    tasks = '[{"data": "syll", "num_search": 12, "num_validation": 8, "num_test": 8}]'
    argv = ["search", "--tasks", tasks, "--search.evaluations", "8", "--selection.finalists", "2",
            "--selection.random_search", "true", "--evaluation.threads", "1", "--folder", str(folder),
            "--json"]  # fmt: skip
    assert main(argv) == 0
    return folder


def test_the_page_of_a_real_run_tells_what_was_searched_with_what_and_what_came_of_it(real: Path) -> None:
    page, result = page_of(real), json.loads((real / "result.json").read_text())
    for row in result["rows"]:
        test = row["scores"]["test"]
        assert row["title"] in page.text
        assert f"{test['fitness']:.3f} [{test['low']:.3f}, {test['high']:.3f}]" in page.text
    for told in ("mixtral", "syll", "accuracy", "12 search, 8 validation, 8 test", "8 evaluations, seed 0"):
        assert told in page.text
    for fact in (result["model"]["hash"], result["software"]["torch"], result["rows"][-1]["digest"]):
        assert fact in page.text
    assert f"moe-evo export {real} --to {real}/checkpoint" in page.text
    assert "No evaluation failed." in page.text


def test_the_curve_of_a_real_run_is_that_of_its_journal(real: Path) -> None:
    (record,) = read_records([real])
    drawn = page_of(real).payload(0)["curve"]
    fitness = [one.fitness for one in record.outcomes.values()]  # type: ignore[union-attr]
    np.testing.assert_allclose(drawn["fitness"], fitness, rtol=1e-4)
    assert drawn["positions"] == list(range(1, 9))
    assert drawn["best"][-1] == [8, pytest.approx(max(fitness), rel=1e-4)]
    assert drawn["random_best"]
    assert {position for position, _, _ in drawn["validation"]} <= set(range(1, 9))
    assert drawn["full"] is not None


def test_maps_hold_the_kept_experts_of_every_contender_but_the_full_model(real: Path) -> None:
    result = json.loads((real / "result.json").read_text())
    maps = {one["key"]: one for one in page_of(real).payload(0)["maps"]}
    assert list(maps) == [row["key"] for row in reversed(result["rows"]) if row["key"] != "full"]
    for row in result["rows"][1:]:
        weights = np.array(maps[row["key"]]["weights"])
        assert weights.shape == (4, 8)
        if row["is_pruning"]:
            assert [list(np.flatnonzero(layer)) for layer in weights] == row["kept"]
            assert maps[row["key"]]["slots"] == []


def test_lineage_goes_back_to_initial_individuals(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", evaluations=60)
    found = page_of(run.path).payload(0)["lineage"]
    assert found["winner"] in found["number"]
    place = {number: row for row, number in enumerate(found["number"])}
    for row, parents in enumerate(found["parents"]):
        operator = found["operators"][found["operator"][row]]
        assert bool(parents) == (operator != "random_pruning")
        assert set(parents) <= place.keys()


def test_nothing_on_the_page_is_loaded_from_elsewhere(real: Path) -> None:
    page = page_of(real)
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "img", "audio", "video", "source")
        for name in ("src", "srcset", "action", "poster", "data", "xlink:href"):
            assert name not in attributes, (tag, attributes)
        if tag == "link":
            assert attributes["href"] == "data:,"
        if tag == "a":
            assert attributes["href"].startswith("#")
    policy = next(one["content"] for tag, one in page.elements if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy and "http" not in policy


def test_names_from_outside_are_text_and_never_markup(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / HOSTILE.replace("/", "⁄"), task=HOSTILE, failures=3), make_run(tmp_path / "b")]
    page = page_of(*(run.path for run in runs))
    assert not [one for tag, one in page.elements if tag == "img" or any(name.startswith("on") for name in one)]
    scripts = [one for tag, one in page.elements if tag == "script"]
    assert len(scripts) == 1 + len(runs) + 3  # the index, the runs' data, Bokeh in two parts, and ours
    assert "alert(2)" in page.text and "{{7*7}}" in page.text
    assert json.loads(page.scripts["index"])["runs"][0]["label"] == runs[0].path.name
    command = next(word for word in page.words if word.startswith("moe-evo show"))
    assert subprocess.run(
        ["/bin/sh", "-c", f"printf %s {command.removeprefix('moe-evo show ')}"], capture_output=True, text=True
    ).stdout == str(runs[0].path)


STEERING = "\x1b[31m\x07\x9b2J\u202e\u2028"
"""Control characters of a terminal, one that turns the direction of writing, and one that ends a line of a script."""


def _steers(text: str) -> bool:
    return any(unicodedata.category(one) in ("Cc", "Cf", "Zl") and one not in "\n\t" for one in text)


def _steering(value: Any) -> Any:
    """A run's result with control characters in every text that may be any."""
    fixed = ("key", "router", "experts", "fitness", "loader", "metric", "kind")
    if isinstance(value, dict):
        return {key: one if key in fixed else _steering(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_steering(one) for one in value]
    return value + STEERING if isinstance(value, str) else value


def test_control_characters_of_any_text_are_never_on_the_page(tmp_path: Path) -> None:
    name = f"run{STEERING}"
    finished, unfinished = make_run(tmp_path / name, failures=3), make_run(tmp_path / f"b{name}", done=20, failures=3)
    result = _steering(json.loads(finished.result.read_text()))
    result["tasks"][0]["name"] = "nli"  # which the config beside it must have, and there it must be printable
    result["software"] = {f"torch{STEERING}": "1"}
    result["rows"][1]["scores"]["test"]["metrics"] = {f"nli{STEERING}/accuracy": 0.5}
    finished.result.write_text(json.dumps(result))
    for run in (finished, unfinished):
        config = yaml.safe_load(run.config.read_text("utf-8"))
        config["tasks"][0]["prefix"] = STEERING
        run.config.write_text(yaml.safe_dump(config))
        with Journal(run.journal) as journal:
            journal.record_pool([(1e9, 0, f"ready{STEERING}", f"rank{STEERING}")], {"gangs": []})
        database = sqlite3.connect(run.journal, isolation_level=None)
        database.execute("UPDATE candidates SET operator = operator || ?", (STEERING,))
        database.execute("UPDATE outcomes SET failure_reason = failure_reason || ?", (STEERING,))
        database.close()
    text = render_page(read_records([finished.path, unfinished.path]))
    page = Page(text)
    ours = text.replace(page.scripts["?"], "")  # without the libraries
    for bokeh in ("bokeh.min.js", "bokeh-api.min.js"):
        ours = ours.replace(files("bokeh").joinpath("server", "static", "js", bokeh).read_text("utf-8"), "")
    assert not _steers(ours)
    assert ours.count("\\x1b[31m") > 10 and "torch\\x1b[31m" in page.text
    for drawn in (json.loads(page.scripts["index"]), page.payload(0), page.payload(1)):
        assert "\\x1b[31m" in str(drawn)
        assert not _steers(json.dumps(drawn, ensure_ascii=False))


def test_an_unfinished_run_is_shown_with_what_it_has(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", evaluations=60, done=20)
    page = page_of(run.path)
    assert "20 of 60" in page.text and "unfinished" in page.text
    assert f"moe-evo search --resume {run.path}" in page.text
    payload = page.payload(0)
    assert len(payload["curve"]["fitness"]) == 20
    assert payload["maps"][0]["title"] == "best so far"
    assert len(payload["maps"][0]["weights"]) == LAYERS


def test_a_run_in_which_nothing_was_evaluated_yet_is_shown_too(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", done=0).path)
    assert "0 of 60" in page.text
    assert page.payload(0)["maps"] == []


def test_a_result_without_its_journal_is_shown_without_a_curve(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.journal.unlink()
    payload = page_of(run.path).payload(0)
    assert payload["curve"]["total"] == 0
    assert payload["maps"]


def test_failures_are_counted_by_reason_with_their_candidates(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", failures=12)
    page = page_of(run.path)
    assert "logits are not finite <b>in layer 2</b>" in page.text
    assert "and 4 more" in page.text
    assert len(page.payload(0)["curve"]["failed"]) == 12


def test_what_happened_to_gangs_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", done=20)
    gang = {
        "number": 3,
        "state": "ready",
        "node": "10.0.0.7",
        "evaluations": 17,
        "evaluations_per_s": 1.5,
        "restarts": 2,
    }
    with Journal(run.journal) as journal:
        events = [(1e9 + n, 3, "broken" if n % 2 else "ready", f"rank 1 died <i>{n % 4}</i>") for n in range(150)]
        journal.record_pool(events, {"gangs": [gang]})
    page = page_of(run.path)
    assert "ready 75×, broken 75×" in page.text
    assert "broken: rank 1 died <i>1</i>" in page.text
    assert "10.0.0.7" in page.text
    assert "50 earlier left out" in page.text


def test_sizes_are_shown_where_the_run_wrote_them_down(tmp_path: Path) -> None:
    with_them, without = (make_run(tmp_path / str(known), parameters=known) for known in (True, False))
    assert "16.00 M (50 %)" in page_of(with_them.path).text
    assert "parameters" not in page_of(without.path).text
    lines = json.loads(page_of(with_them.path, without.path).scripts["index"])["lines"]
    assert {line["parameters"] for line in lines} == {None, 16_000_000, 32_000_000}


def test_task_scores_that_are_no_shares_have_no_interval_of_a_share(tmp_path: Path) -> None:
    text = page_of(make_run(tmp_path / "run").path).text
    assert "log likelihood in nats" in text
    (record,) = read_records([tmp_path / "run"])
    from moe_evo.report.sections import task_table

    table = task_table(record)
    assert table is not None
    for one in table.metrics:
        for value, low, high in one.cells:
            assert (low is None) == (one.metric == "log_likelihood")
            assert low is None or low <= value <= high


def test_more_evaluations_than_can_be_seen_are_thinned_but_improvements_stay(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", evaluations=3 * MOST_POINTS)
    (record,) = read_records([run.path])
    drawn = curve(record)
    assert MOST_POINTS <= len(drawn["fitness"]) <= MOST_POINTS + 200
    assert {position for position, _ in drawn["best"]} <= set(drawn["positions"])
    assert {position for position, _, _ in drawn["validation"]} <= set(drawn["positions"])


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """60 runs of 2,000 evaluations: ten numbers of experts kept, six seeds each."""
    root, shape = tmp_path_factory.mktemp("many"), shape_of(2, 16)
    folders = []
    for num_kept in range(2, 12):
        template = root / f"{num_kept}.sqlite"
        write_candidates(template, shape, num_kept, 2000)
        for seed in range(6):
            path = root / f"keep{num_kept}-seed{seed}"
            make_run(path, num_kept=num_kept, seed=seed, evaluations=2000, failures=5, shape=shape, template=template)
            folders.append(path)
    return folders


def test_sixty_runs_of_two_thousand_evaluations_make_less_than_five_megabytes(many: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    began = time.process_time()
    written = write_report([str(one) for one in many], str(target), overwrite=False)
    assert time.process_time() - began < 30
    assert written.runs == 60
    assert target.stat().st_size == written.bytes < 5_000_000
    page = Page(target.read_text("utf-8"))
    assert all(len(page.payload(number)["curve"]["fitness"]) == 1995 for number in (0, 59))


def test_equal_runs_give_equal_payloads(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    first, second = (run_payload(read_records([tmp_path / "run"])[0]) for _ in range(2))
    assert first == second


def test_labels_are_as_short_as_they_can_be_and_a_run_given_twice_is_one(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / part / "run").path for part in ("a", "b")]
    assert [one.label for one in read_records([*folders, folders[0]])] == ["a/run", "b/run"]
    assert [one.label for one in read_records(folders[:1])] == ["run"]


def test_the_command_says_where_the_report_is_and_replaces_an_older_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", done=5)
    for _ in range(2):
        assert main(["report", str(run.path)]) == 0
        out = capsys.readouterr().out
        assert str(run.path / "report.html") in out
        assert (run.path / "report.html").as_uri() in out
        assert "not finished" in out
    assert main(["report", str(run.path), "--to", str(tmp_path / "new" / "a.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == 1
    assert not list(tmp_path.glob("**/.*.html*"))


def test_a_file_that_is_no_report_is_kept_unless_told_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, target = make_run(tmp_path / "run", done=5), tmp_path / "thesis.html"
    target.write_text("my thesis")
    assert main(["report", str(run.path), "--to", str(target)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert target.read_text() == "my thesis"
    assert main(["report", str(run.path), "--to", str(target), "--overwrite"]) == 0
    assert target.read_text("utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere"], "not the folder of a run"),
        (["{run}", "{other}"], "--to: got none for 2 runs"),
        (["{run}", "--to", "{run}"], "is a folder"),
        ([], "RUN: is missing, expected folders of runs, finished or not"),
    ],
)
def test_wrong_input_is_one_line(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: str(make_run(tmp_path / name, done=1).path) for name in ("run", "other")}
    assert main(["report", *(word.format(**paths) for word in argv)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", done=1)
    for text in ("a: [", "7", "search: {}"):
        run.config.write_text(text)
        with pytest.raises(RunError, match=r"config\.yaml"):
            read_records([run.path])


def test_reports_and_comparisons_load_neither_torch_nor_ray(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    program = (
        "import sys; from moe_evo.cli.main import main\n"
        f"for command in ('report', 'compare'): assert main([command, {str(run.path)!r}]) == 0\n"
        "print('loaded', {'torch', 'ray', 'wandb', 'transformers', 'matplotlib', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded set()"

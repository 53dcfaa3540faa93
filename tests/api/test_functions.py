"""`moe_evo.search` and its neighbours, as a script or a notebook calls them."""

from __future__ import annotations

import asyncio
import doctest
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_evo
from moe_evo.api import functions
from moe_evo.commands.search import search as search_command
from moe_evo.errors import ConfigError, GenomeError, MoeEvoError, RunError, TaskError
from moe_evo.tracking.base import Trackers

TASK = {"data": "syll", "num_search": 8, "num_validation": 8, "num_test": 8}
SMALL: dict[str, Any] = {
    "tasks": [TASK], "num_kept": 4, "finalists": 2, "baselines": [], "threads": 1, "self_check": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> moe_evo.Run:
    return moe_evo.search(**SMALL, evaluations=8, folder=str(tmp_path_factory.mktemp("api") / "run"))


def well_formed(text: str) -> bool:
    """Whether every element that begins also ends."""
    open_elements: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            open_elements.append(tag)

        def handle_startendtag(self, tag: str, attrs: object) -> None: ...

        def handle_endtag(self, tag: str) -> None:
            assert open_elements.pop() == tag

    Parser().feed(text)
    return not open_elements


def test_the_examples_in_the_docstrings_are_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    for name in ("search", "load_run", "evaluate", "prune", "export", "sweep", "compare"):
        (found,) = finder.find(getattr(functions, name), name)
        assert found.examples
        assert runner.run(found).failed == 0, name


def test_the_names_are_listed_and_only_imported_when_they_are_used() -> None:
    names = {"search", "load_run", "evaluate", "prune", "export", "sweep", "compare", "load_pruned", "Run", "Sweep"}
    assert names <= set(moe_evo.__all__) and set(moe_evo.__all__) <= set(dir(moe_evo))
    program = (
        "import sys, moe_evo; dir(moe_evo)\n"
        "heavy = {'torch', 'ray', 'wandb', 'transformers', 'matplotlib', 'scipy', 'jsonargparse'} & set(sys.modules)\n"
        "moe_evo.search, moe_evo.load_run, moe_evo.Run\n"
        "later = {'torch', 'ray', 'wandb', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "print(heavy, later)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set() set()\n"
    with pytest.raises(AttributeError, match="no attribute 'serch'"):
        _ = moe_evo.serch


def test_a_search_prints_nothing_unless_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = moe_evo.search(**SMALL, evaluations=3, folder=str(tmp_path / "run"))
    found.evaluate(split="test")
    (tmp_path / "swept.yaml").write_text("sweep: {seeds: [0, 1]}\n")
    with pytest.raises(TaskError, match="nowhere"):
        moe_evo.search(config=tmp_path / "swept.yaml", tasks=["nowhere.jsonl"])
    found.export(tmp_path / "small")
    assert capfd.readouterr() == ("", "")
    moe_evo.search(**SMALL, evaluations=3, folder=str(tmp_path / "other"), progress=True)
    told = capfd.readouterr()
    assert told.out == "" and "search (surrogate): 3 evaluations" in told.err


def test_the_same_call_again_is_the_same_run(run: moe_evo.Run) -> None:
    before = (run.folder / "journal.sqlite").read_bytes()
    again = moe_evo.search(**SMALL, evaluations=8, folder=str(run.folder))
    assert again.result == run.result and (run.folder / "journal.sqlite").read_bytes() == before
    with pytest.raises(RunError, match="another config"):
        moe_evo.search(**SMALL, evaluations=8, seed=99, folder=str(run.folder))
    with pytest.raises(RunError, match="got 7, expected 8 or more"):
        moe_evo.search(**SMALL, evaluations=7, folder=str(run.folder))


def test_a_run_tells_what_it_found(run: moe_evo.Run) -> None:
    assert repr(run) == f"<Run finished in {run.folder}>"
    assert run.is_finished and run.so_far.evaluations == 8 and run.config.search.evaluations == 8
    best = run.result.best
    assert best.test is not None
    assert str(best.test) == f"{best.test.fitness:.3f} [{best.test.low:.3f}, {best.test.high:.3f}]"
    assert f"best {best.test}" in repr(run.result) and len(repr(run.result)) < 400
    assert run.genome().digest == best.digest and run.genome().kept == best.kept
    with pytest.raises(RunError, match="has no genome 'soup', expected one of: best"):
        run.genome("soup")
    with pytest.raises(RunError, match="not the folder of a run"):
        moe_evo.load_run(run.folder / "nowhere")


def test_scores_of_a_run_are_found_again(run: moe_evo.Run) -> None:
    by_run = moe_evo.evaluate(run, split="test")
    assert by_run.score.fitness == run.result.best.scores["test"].fitness
    assert run.evaluate(split="test").score == by_run.score
    assert run.evaluate().score == moe_evo.evaluate(run).score, "the same default"
    for genome in (run, run.folder, str(run.folder)):
        assert moe_evo.evaluate(genome=genome, split="test").score == by_run.score, "with the run's model and tasks"
    named = moe_evo.evaluate(tasks=[TASK], genome=run.genome(), split="test", threads=1)
    assert named.score == by_run.score and named.genome.startswith("genome ")
    assert moe_evo.evaluate(run, genome="full", split="test").num_kept == (8, 8, 8, 8)
    with pytest.raises(GenomeError, match="no such file"):
        run.evaluate(genome="nowhere")
    with pytest.raises(ConfigError, match="config: got it beside a run"):
        moe_evo.evaluate(run, config={})


def test_runs_and_answers_show_themselves_in_a_notebook_without_a_network(run: moe_evo.Run, tmp_path: Path) -> None:
    shown = {
        "run": run._repr_html_(),
        "score": run.evaluate()._repr_html_(),
        "export": run.export(tmp_path / "small")._repr_html_(),
        "comparison": moe_evo.compare(run, run)._repr_html_(),
    }
    for name, text in shown.items():
        assert well_formed(text), name
        assert "http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "") and "<script" not in text
    assert shown["run"].count("<svg") == 2 and shown["run"].count("<rect") == 4 * 8
    assert shown["run"].count("<circle") == 8 and str(run.result.best.test) in shown["run"]
    (unfinished := tmp_path / "unfinished").mkdir()
    for name in ("config.yaml", "journal.sqlite"):
        (unfinished / name).write_bytes((run.folder / name).read_bytes())
    found = moe_evo.load_run(unfinished)
    assert repr(found).startswith("<Run unfinished") and well_formed(found._repr_html_())
    assert "8 of 8" in found._repr_html_()
    with pytest.raises(RunError, match="not finished"):
        _ = found.result
    assert found.resume().result.best == run.result.best


def test_answers_are_told_in_a_line(run: moe_evo.Run, tmp_path: Path) -> None:
    test = run.result.best.scores["test"]
    assert repr(moe_evo.compare(run)) == (
        f"<Comparison of 1 runs; winners on the test split: {run.folder.name} {test.fitness:.3f}>"
    )
    small = moe_evo.prune(
        tasks=[TASK], method="reap", num_kept=4, to=tmp_path / "small", threads=1, self_check=False
    )  # fmt: skip
    assert repr(small).startswith(f"<PrunedModel by reap in {tmp_path / 'small'}; on the test split: full model ")
    assert well_formed(small._repr_html_())
    assert str(run.evaluate(split="test")).endswith(f": {test} on 8 test examples")


def test_a_run_writes_its_report(run: moe_evo.Run, tmp_path: Path) -> None:
    written = run.report(tmp_path / "page.html")
    assert written.runs == 1 and (tmp_path / "page.html").read_text("utf-8").startswith("<!doctype html>")


def test_it_works_while_an_event_loop_runs(tmp_path: Path) -> None:
    async def cell() -> moe_evo.Run:
        return moe_evo.search(**SMALL, evaluations=3, folder=str(tmp_path / "run"))

    assert asyncio.run(cell()).is_finished


def in_threads(*calls: Callable[[], object]) -> None:
    """Run calls side by side; raises what one of them raised."""
    errors: list[BaseException] = []

    def guarded(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - the border of the thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    if errors:
        raise errors[0]


def test_two_threads_take_turns_and_find_what_each_finds_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[str] = []
    seen: list[int] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        inside.append("one")
        seen.append(len(inside))
        try:
            return search_command(*arguments, **options)
        finally:
            inside.pop()

    monkeypatch.setattr("moe_evo.commands.search.search", watched)
    threads = torch.get_num_threads()
    options = {**SMALL, "threads": None}

    def call(where: str, seed: int) -> Callable[[], object]:
        return lambda: moe_evo.search(
            **{**options, "threads": 1 + seed}, evaluations=6, seed=seed, folder=str(tmp_path / where)
        )

    in_threads(call("a0", 0), call("a1", 1))
    assert seen == [1, 1] and torch.get_num_threads() == threads
    for seed in (0, 1):
        call(f"b{seed}", seed)()
        both = [moe_evo.load_run(tmp_path / f"{where}{seed}").result for where in "ab"]
        assert both[0].rows == both[1].rows


@pytest.fixture
def user_of_pyplot() -> Iterator[Any]:
    import matplotlib.pyplot as plt

    before = plt.get_backend()
    plt.switch_backend("svg")
    yield plt
    plt.switch_backend(before)


def test_the_pictures_of_a_notebook_are_left_alone(user_of_pyplot: Any, tmp_path: Path) -> None:
    figure = user_of_pyplot.figure()
    moe_evo.search(**SMALL, evaluations=3, folder=str(tmp_path / "run"))
    assert user_of_pyplot.get_backend().lower() == "svg" and user_of_pyplot.get_fignums() == [figure.number]
    user_of_pyplot.close(figure)


def test_errors_are_those_of_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(MoeEvoError, match="no such folder"):
        moe_evo.search(str(tmp_path / "none"), [TASK], folder=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="--method: got 'luck', expected one of"):
        moe_evo.prune(tasks=[TASK], method="luck", num_kept=4, to=tmp_path / "small")
    with pytest.raises(ConfigError, match="compare: got no runs"):
        moe_evo.compare()
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_silent_is_a_tracker() -> None:
    Trackers().message(json.dumps("nothing is printed"))
